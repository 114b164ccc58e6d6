"""A ChatML fine-tune as transformers saves it, from its folder alone: chat, stop ids, sampling defaults."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

import mixtral as package
from binary import DEMO, edit_config, mixtral, ok, ok_json

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ANSWER = "Hé日x"  # of bytes, but for the letters: a token is less than a character
HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}]


def relabel(model: MixtralForCausalLM, prompt: list[int], answer: list[int]) -> bool:
    """Rename tokens so that the model's most likely answer to ``prompt`` is ``answer``; False where that cannot be."""
    free = model.generate(torch.tensor([prompt]), max_new_tokens=len(answer), do_sample=False, eos_token_id=None)
    free = free[0, len(prompt) :].tolist()
    if len(set(free)) < len(free) or set(free + answer[:-1]) & set(prompt) or set(free) & set(answer):
        return False
    for layer, count in ((model.get_output_embeddings(), len(answer)), (model.get_input_embeddings(), len(answer) - 1)):
        old, new = free[:count], answer[:count]  # the last token, which the prompt has too, is not read again
        layer.weight.data[old + new] = layer.weight.data[new + old]
    return True


@pytest.fixture(scope="module")
def fine_tune(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MixtralForCausalLM, list[int], list[int]]:
    """The folder; the model that was saved there; the ids of HELLO; those of ANSWER and <|im_end|>."""
    folder = tmp_path_factory.mktemp("chatml") / "model"
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    prompt = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    letters = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in ANSWER.encode()]
    answer = [*letters, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    config = MixtralConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=512,
        sliding_window=None,
        initializer_range=0.2,
        eos_token_id=2,
    )
    for seed in range(20):
        torch.manual_seed(seed)
        model = MixtralForCausalLM(config).eval()
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        if relabel(model, prompt, answer):
            break
    else:
        raise AssertionError("no random model says what is wanted")
    model.generation_config.eos_token_id = [2, answer[-1]]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert (folder / "chat_template.jinja").exists() and not (folder / "tokenizer.model").exists()
    return folder, model, prompt, answer


@pytest.fixture
def copy(fine_tune: tuple, tmp_path: Path) -> Path:
    return shutil.copytree(fine_tune[0], tmp_path / "model")


def test_chat_renders_the_template_and_stops_at_its_end(fine_tune: tuple) -> None:
    folder, model, prompt, answer = fine_tune
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[0, len(prompt) :].tolist()
    assert theirs == answer
    arguments = ("chat", folder, "--system", HELLO[0]["content"], "--temp", "0", "-n", "30", "--dtype", "float32")
    assert ok(*arguments, stdin=b"Hello there\n").decode() == ANSWER + "\n"
    user = HELLO[1:]
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(user, add_generation_prompt=True, return_dict=False)
    explained = ok_json("tokenize", folder, "--chat", "-p", "Hello there", "--explain")
    assert explained["token_ids"] == ids and explained["chat_format"] == "chatml (chat_template.jinja)"
    assert explained["bos"] == "none: the chat format has none" and "<|im_end|> ends each" in explained["eos"]


def test_python_streams_whole_characters_up_to_the_end(fine_tune: tuple) -> None:
    folder, _, prompt, answer = fine_tune
    model = package.Mixtral.from_pretrained(folder, dtype="float32")
    assert model.tokenizer.apply_chat(HELLO) == prompt and model.config.eos_token_ids == [2, answer[-1]]
    pieces: list[str] = []
    result = model.generate(prompt, max_tokens=30, on_text=lambda i, piece: pieces.append(piece) or True)[0]
    assert result.token_ids == answer[:-1] and result.finish_reason == "stop" and result.text == ANSWER
    shown = [piece for piece in pieces if piece]  # an empty one asks whether to go on
    assert shown == list(ANSWER) == list(model.stream(prompt, max_tokens=30))


def test_generate_stops_at_the_ids_of_both_files(copy: Path) -> None:
    flags = ("-p", "Once upon", "-n", "8")
    free = ok_json("generate", copy, *flags, "--ignore-eos")["token_ids"]
    assert len(set(free)) == 8 and 2 not in free
    for config, generation, stop in ((2, free[3], 3), ([2, free[2]], free[4], 2), (free[5], [2, free[6]], 5)):
        edit_config(copy, eos_token_id=config)
        (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
        result = ok_json("generate", copy, *flags)
        assert result["token_ids"] == free[:stop] and result["finish_reason"] == "stop"


def test_chat_stops_at_the_templates_end_whatever_the_stop_ids(copy: Path) -> None:
    (copy / "generation_config.json").unlink()
    assert ok_json("info", copy)["eos_token_ids"] == [2]
    arguments = ("chat", copy, "--system", "Be brief.", "--temp", "0", "-n", "30", "--dtype", "float32")
    assert ok(*arguments, stdin=b"Hello there\n").decode() == ANSWER + "\n"
    on = ok(*arguments, "--ignore-eos", stdin=b"Hello there\n").decode()
    assert on.startswith(ANSWER) and len(on) > len(ANSWER) + 1


def test_info_shows_stop_ids_format_and_sampling(copy: Path) -> None:
    generation = {"eos_token_id": 4097, "do_sample": True, "temperature": 0.6, "top_p": 0.9, "typical_p": 0.5}
    (copy / "generation_config.json").write_text(json.dumps(generation))
    info = ok_json("info", copy)
    assert info["eos_token_ids"] == [2, 4097]
    assert info["chat_format"] == {"name": "chatml", "source": "chat_template.jinja"}
    assert info["generation_config"] == {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    report = ok("info", copy).decode()
    assert "stop ids       2 (</s>), 4097 (<|im_end|>)\n" in report
    assert "chat format    chatml (chat_template.jinja)\n" in report
    assert "do_sample true, temperature 0.6, top_p 0.9 (generation_config.json" in report
    assert "typical_p is not supported" in report
    (copy / "chat_template.jinja").unlink()
    assert ok_json("info", copy)["chat_format"] is None
    assert "chat format    no chat template: a base model\n" in ok("info", copy).decode()
    (copy / "chat_template.jinja").write_text("{% include 'x' %}")
    assert "the tag include is not supported" in ok("info", copy).decode()


def test_sampling_defaults_are_used_on_request(copy: Path) -> None:
    def text(*flags: str) -> str:
        run = mixtral("generate", copy, "-p", "Once", "-n", "12", "--ignore-eos", "--seed", "1", "--json", *flags)
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)["token_ids"]

    def write(**fields: object) -> None:
        (copy / "generation_config.json").write_text(json.dumps(fields))

    greedy, warm = text(), text("--temp", "1.5", "--top-k", "40")
    assert greedy != warm
    write(do_sample=True, temperature=1.5, top_k=40)
    assert text() == greedy and text("--generation-config") == warm
    assert text("--generation-config", "--temp", "0") == greedy
    model = package.Mixtral.from_pretrained(copy)
    assert model.sampling_defaults == {"temperature": 1.5, "top_k": 40}
    options = dict(max_tokens=12, ignore_eos=True, seed=1)
    assert model.generate("Once", **options)[0].token_ids == greedy
    assert model.generate("Once", **options, generation_config=True)[0].token_ids == warm
    assert model.generate("Once", **options, generation_config=True, temperature=0)[0].token_ids == greedy
    write(do_sample=False, temperature=1.5)
    assert text("--generation-config") == greedy
    assert text("--generation-config", "--temp", "1.5", "--top-k", "40") == warm
    write(do_sample=True)
    assert text("--generation-config") == text("--temp", "1")
    write(no_repeat_ngram_size=3)
    run = mixtral("generate", copy, "-p", "Once", "-n", "1", "--generation-config")
    assert run.returncode == 0
    assert (
        run.stderr == b"mixtral: warning: generation_config.json: no_repeat_ngram_size is not supported and not used\n"
    )
    write(temperature="hot")
    run = mixtral("generate", copy, "-p", "Once", "-n", "1")
    assert run.returncode == 3 and b'temperature: must be a number, got "hot"' in run.stderr


def test_a_stop_id_outside_the_vocabulary_is_a_warning(copy: Path) -> None:
    edit_config(copy, eos_token_id=[2, 5000])
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [4097, 6000]}))
    warnings = [
        f"config.json: eos_token_id: {token} is not in the vocabulary of 4098 and is left out" for token in (5000, 6000)
    ]
    for command in (("info", copy), ("generate", copy, "-p", "Once", "-n", "1"), ("chat", copy, "-n", "1")):
        run = mixtral(*command, stdin=b"Hello\n")
        assert run.returncode == 0 and run.stderr.count(b"\n") == 2
        assert all(warning in run.stderr.decode() for warning in warnings)
    with pytest.warns(UserWarning) as caught:
        model = package.Mixtral.from_pretrained(copy)
    assert all(any(warning in str(each.message) for each in caught) for warning in warnings)
    assert model.config.eos_token_ids == [2, 4097]


def test_without_stop_ids_in_params_json_the_tokenizer_has_one(tmp_path: Path) -> None:
    sizes = dict(dim=64, n_layers=1, head_dim=16, hidden_dim=48, n_heads=4, n_kv_heads=2, norm_eps=1e-5)
    (tmp_path / "params.json").write_text(json.dumps({**sizes, "vocab_size": 4096}))
    assert package.Config.from_folder(tmp_path).eos_token_ids == [2]
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["</s>"], vocabulary["<s>"] = vocabulary["<s>"], vocabulary["</s>"]
    for token in tokenizer["added_tokens"]:
        token["id"] = vocabulary[token["content"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert package.Config.from_folder(tmp_path).eos_token_ids == [1]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    assert ok_json("info", tmp_path)["eos_token_ids"] == [1, 7]
    (tmp_path / "params.json").write_text(json.dumps({**sizes, "vocab_size": 4096, "eos_token_id": 5}))
    assert ok_json("info", tmp_path)["eos_token_ids"] == [5, 1, 7]


def test_a_base_model_is_told_what_to_do(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    for command in (("chat", copy), ("tokenize", copy, "--chat", "-p", "a")):
        run = mixtral(*command, stdin=b"Hello\n")
        assert run.returncode == 2 and run.stdout == b"" and run.stderr.count(b"\n") == 1
        assert b"it is a base model" in run.stderr and b"--chat-template mistral-v1" in run.stderr
    chatml = ok_json("tokenize", copy, "--chat", "-p", "a", "--chat-template", "chatml")["pieces"]
    assert chatml[0] == "<|im_start|>" and chatml.count("<|im_end|>") == 1
    ok("chat", copy, "-n", "2", "--chat-template", "mistral-v1", stdin=b"Hello\n")
    run = mixtral("chat", copy, "--chat-template", "mistral-v3", stdin=b"Hello\n")
    assert run.returncode == 2 and b"mistral-v3: the tokenizer has none of its control tokens" in run.stderr
    run = mixtral("chat", copy, "--chat-template", "gemma", stdin=b"Hello\n")
    assert run.returncode == 2 and b"mistral-v7, chatml, zephyr, llama-2, alpaca, vicuna, got gemma" in run.stderr


def test_a_template_that_is_not_known_is_refused(copy: Path) -> None:
    (copy / "chat_template.jinja").write_text("{% for m in messages %}\n{{ m | tojson }}\n{% endfor %}")
    run = mixtral("chat", copy, stdin=b"Hello\n")
    assert run.returncode == 3 and run.stdout == b"" and run.stderr.count(b"\n") == 1
    assert b"chat_template.jinja: chat_template: line 2: the filter tojson is not supported" in run.stderr
    assert b"--chat-template" in run.stderr
    tokenizer = package.Tokenizer(copy)
    expected = tokenizer.encode('{"role": "user", "content": "é"}\n', parse_special=True)
    assert tokenizer.apply_chat([{"role": "user", "content": "é"}]) == expected
    (copy / "chat_template.jinja").write_text("{{ raise_exception('not today') }}")
    run = mixtral("chat", copy, stdin=b"Hello\n")
    assert run.returncode == 2 and run.stderr == b"mixtral: chat: the chat template says: not today\n"
