"""lm-evaluation-harness: task files on local data give the numbers of its ``hf`` model on the same checkpoint."""

import json
import os
import shutil

import pytest
import torch

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

import mixtral
from checkpoints import random_model
from mixtral.integrations import lm_eval as integration
from python_models import DEMO, demo_model, tiny_model

WORDS = "and the king said unto them that he would give a tenth of all his land to his son".split()
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {kind}
doc_to_text: {text}
doc_to_target: {target}
{more}
metadata: {{version: 1.0}}
"""


def documents() -> list[dict]:
    generator = torch.Generator().manual_seed(0)

    def words(longest: int) -> str:
        count = int(torch.randint(1, longest, (1,), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator).tolist())

    return [
        {"question": words(30) + " ", "choices": [words(9) for _ in range(4)], "answer": i % 4, "text": words(150)}
        for i in range(8)
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    random_model(vocab_size=4096, max_position_embeddings=64, num_local_experts=4).save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.json").write_text("\n".join(map(json.dumps, documents())))
    (folder / "metrics.py").write_text(
        "def length(doc, results):\n    return {'length': float(sum(map(len, results)))}\n"
    )
    choice = "doc_to_choice: choices\nmetric_list: [{metric: acc}, {metric: acc_norm}]"
    rolling = "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]"
    generate = (
        "generation_kwargs: {until: [' the', 'xyz'], max_gen_toks: 12, do_sample: false}\n"
        "process_results: !function metrics.length\nmetric_list: [{metric: length, aggregation: mean}]"
    )
    for name, kind, text, target, more in (
        ("choice", "multiple_choice", "question", "answer", choice),
        ("rolling", "loglikelihood_rolling", '""', "text", rolling),
        ("generate", "generate_until", "question", "answer", generate),
    ):
        task = TASK.format(name=name, kind=kind, text=text, target=target, more=more, data=folder / "data.json")
        (folder / f"{name}.yaml").write_text(task)
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(model, task: str, tasks: TaskManager, **options) -> tuple[dict, list]:
    output = lm_eval.simple_evaluate(
        model, tasks=[task], task_manager=tasks, bootstrap_iters=0, log_samples=True, **options
    )
    return output["results"][task], [sample["resps"] for sample in output["samples"][task]]


@pytest.mark.parametrize("task", ["choice", "rolling", "generate"])
def test_a_task_gives_the_numbers_of_the_hf_model(task, checkpoint, tasks):
    ours = evaluate("mixtral", task, tasks, model_args={"pretrained": str(checkpoint), "dtype": "float32"})
    arguments = {"pretrained": str(checkpoint), "dtype": "float32", "device": "cpu"}
    theirs = evaluate("hf", task, tasks, model_args=arguments, batch_size=3)
    assert ours[0].keys() == theirs[0].keys()
    for name, value in theirs[0].items():
        assert ours[0][name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), name
    if task == "generate":
        # Where byte tokens are no UTF-8 the tokenizers library replaces all of a run, ours the wrong ones alone.
        whole = [(a, b) for a, b in zip(ours[1], theirs[1], strict=True) if "\ufffd" not in b[0][0]]
        assert len(whole) >= 4 and all(a == b for a, b in whole) and any(b[0][0] for _, b in whole)
    elif task == "choice":
        for mine, their in zip(ours[1], theirs[1], strict=True):
            for ((logprob, greedy),), ((expected, expected_greedy),) in zip(mine, their, strict=True):
                assert logprob == pytest.approx(expected, abs=1e-4) and greedy == expected_greedy
    else:
        for ((mine,),), ((expected,),) in zip(ours[1], theirs[1], strict=True):
            assert mine == pytest.approx(expected, rel=1e-4)


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def demo() -> integration.MixtralLM:
    return integration.MixtralLM(demo_model())


def test_a_score_does_not_depend_on_the_requests_beside_it(demo):
    pairs = [(d["question"], choice) for d in documents() for choice in d["choices"]] + [
        ("", "Once"),
        ("Once", " upon"),
    ]
    together = demo.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    alone = [demo.loglikelihood(requests("loglikelihood", pair), disable_tqdm=True)[0] for pair in pairs]
    assert together == alone


def test_is_greedy_means_the_continuation_that_generation_gives(demo):
    prompt = "And it came to pass"
    text = demo.model.generate(prompt, max_tokens=4)[0].text
    (likely, greedy), (_, other) = demo.loglikelihood(
        requests("loglikelihood", (prompt, text), (prompt, " xylophone")), disable_tqdm=True
    )
    assert greedy and not other and likely < 0


def test_rolling_is_perplexity_where_the_text_fits(demo):
    text = "And it came to pass in those days, that there went out a decree from Caesar Augustus."
    without_bos = integration.MixtralLM(demo_model(), add_bos_token=False)
    (total,) = without_bos.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), disable_tqdm=True)
    score = demo_model().perplexity(text)
    assert total == pytest.approx(-score.nats_per_token * score.tokens, rel=1e-6)


def test_generations_differ_by_their_settings_and_stop_where_asked(demo):
    prompt = "And it came to pass"
    settings = [{"until": [], "max_gen_toks": 8}, {"until": ["t"], "max_gen_toks": 8}, {"until": [], "max_gen_toks": 3}]
    texts = demo.generate_until(requests("generate_until", *[(prompt, s) for s in settings]), disable_tqdm=True)
    assert texts[1] == texts[0].split("t")[0] and texts[0].startswith(texts[2]) and len(texts[2]) < len(texts[0])


def test_a_conversation_becomes_the_ids_of_the_model_s_own_template(demo, checkpoint, tmp_path):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    asked = [*chat, {"role": "user", "content": "Who?"}]
    tokenizer = demo_model().tokenizer
    assert demo.tok_encode(demo.apply_chat_template(asked)) == tokenizer.apply_chat(asked)
    goes_on = [chat[0], {**chat[1], "prefix": True}]
    assert demo.tok_encode(demo.apply_chat_template(chat, False)) == tokenizer.apply_chat(goes_on)
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="has no chat template"):
        integration.MixtralLM(folder, dtype="float32").apply_chat_template(asked)


def test_wrong_arguments_are_value_errors(demo):
    with pytest.raises(ValueError, match="expected a tokenizer"):
        integration.MixtralLM(tiny_model())
    with pytest.raises(ValueError, match="max_length must be in"):
        integration.MixtralLM(demo_model(), max_length=10**9)
    with pytest.raises(ValueError, match="max_gen_toks must be below"):
        demo.generate_until(requests("generate_until", ("a", {"max_gen_toks": 10**6})), disable_tqdm=True)
    with pytest.raises(mixtral.LoadError):
        integration.MixtralLM(DEMO / "none")
