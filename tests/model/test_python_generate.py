"""Generation from Python: prompts, sampling, stopping, streaming, and errors."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import mixtral
from python_models import DEMO, ROOT, demo_model, tiny_config, tiny_model


@pytest.fixture
def demo() -> mixtral.Mixtral:
    return demo_model()


@pytest.fixture
def tiny() -> mixtral.Mixtral:
    return tiny_model()


def test_generate_takes_text_ids_one_or_many(demo):
    ids = demo.tokenizer.encode("Once", add_bos=True)
    assert ids[0] == demo.tokenizer.bos_id
    expected = demo.generate(["Once"], max_tokens=8)[0]
    assert expected.prompt_token_ids == ids
    arrays = (np.array(ids), np.array([ids, ids], dtype=np.int32), torch.tensor(ids), torch.tensor([ids, ids]))
    lists = (
        list(np.array(ids)),
        list(torch.tensor(ids)),
        [torch.tensor(ids), "Once"],
        (text for text in ["Once", ids]),
    )
    for prompts in ("Once", ids, [ids], ["Once", ids], tuple(ids), *arrays, *lists):
        for out in demo.generate(prompts, max_tokens=8):
            assert (out.token_ids, out.text) == (expected.token_ids, expected.text)
    assert demo.generate([]) == []


def test_greedy_generation_follows_the_logits(tiny):
    prompt = [5, 6, 7]
    out = tiny.generate(prompt, max_tokens=12, ignore_eos=True)[0]
    assert out.finish_reason == "length" and len(out.token_ids) == 12
    logits = tiny(torch.tensor([prompt + out.token_ids]))[0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == out.token_ids


def test_result_of_a_model_without_tokenizer_has_ids_only(tiny):
    assert tiny.tokenizer is None
    assert tiny.generate([3], max_tokens=2, ignore_eos=True)[0].text == ""
    with pytest.raises(ValueError, match="no tokenizer"):
        tiny.generate("Once")
    with pytest.raises(ValueError, match="tokenizer"):
        tiny.stream([1])


def test_text_continues_the_prompt(demo):
    out = demo.generate("The", max_tokens=20)[0]
    assert out.text and "The" + out.text == demo.tokenizer.decode(out.prompt_token_ids + out.token_ids)
    assert repr(out.text) in repr(out) and out.finish_reason in repr(out)


def test_sampling_is_repeatable_by_seed(demo):
    def sample(seed):
        return demo.generate("The", max_tokens=16, temperature=1.5, seed=seed, ignore_eos=True)[0].token_ids

    assert sample(3) == sample(3)
    assert len({tuple(sample(seed)) for seed in range(4)}) > 1


def test_stop_string_ends_and_is_cut_off(demo):
    text = demo.generate("The", max_tokens=24, ignore_eos=True)[0].text
    stop = text[len(text) // 2 :][:3]
    for given in (stop, [stop, "\0never"]):
        out = demo.generate("The", max_tokens=24, ignore_eos=True, stop=given)[0]
        assert out.finish_reason == "stop"
        assert out.text == text[: text.index(stop)]


def test_logprobs_only_when_asked_for(tiny):
    assert tiny.generate([5], max_tokens=3, ignore_eos=True)[0].logprobs == []
    out = tiny.generate([5], max_tokens=3, ignore_eos=True, logprobs=2)[0]
    expected = tiny(torch.tensor([[5, *out.token_ids]]))[0].double().log_softmax(-1)
    for step, entry in enumerate(out.logprobs):
        assert entry.token_id == out.token_ids[step] == entry.top[0][0]
        assert len(entry.top) == 2 and entry.top[0][1] >= entry.top[1][1]
        assert entry.logprob == pytest.approx(expected[step, entry.token_id].item(), abs=1e-5)


@pytest.mark.parametrize(
    "options, word",
    [
        (dict(max_tokens=-1), "max_tokens"),
        (dict(temperature=-0.1), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(top_p=0.0), "top_p"),
        (dict(top_k=-1), "top_k"),
        (dict(min_p=1.5), "min_p"),
        (dict(repetition_penalty=0.0), "repetition_penalty"),
        (dict(logprobs=21), "logprobs"),
        (dict(max_tokens=100_000), "context of 512 tokens"),
    ],
)
def test_wrong_parameters_are_value_errors_that_name_them(tiny, options, word):
    with pytest.raises(ValueError, match=word):
        tiny.generate([1], **options)


@pytest.mark.parametrize("prompt", [[[]], [[96]], [[1, -1]]])
def test_wrong_prompts_are_value_errors(tiny, prompt):
    with pytest.raises(ValueError):
        tiny.generate(prompt)


def test_unknown_option_is_a_type_error():
    with pytest.raises(TypeError, match="chunk"):
        mixtral.Mixtral.from_config(tiny_config(), chunk=3)


def test_timings_show_a_cache_that_stays_small(tiny):
    tiny.generate([5], max_tokens=200, ignore_eos=True)
    assert (tiny.timings.prompt_tokens, tiny.timings.new_tokens) == (1, 200)
    model = mixtral.Mixtral.from_config(tiny_config(window=0))
    model.generate([5], max_tokens=200, ignore_eos=True)
    assert tiny.timings.peak_pages < model.timings.peak_pages


def test_on_text_gets_the_text_and_can_end_it(demo):
    pieces = []
    out = demo.generate("The", max_tokens=16, ignore_eos=True, on_text=lambda i, piece: pieces.append(piece) or True)[0]
    assert "".join(pieces) == out.text

    out = demo.generate("The", max_tokens=16, ignore_eos=True, on_text=lambda i, piece: not piece)[0]
    assert out.finish_reason == "cancelled" and len(out.token_ids) < 16


def test_on_text_that_returns_false_cancels_its_own_prompt_alone(demo):
    first, second = demo.generate(["The", "And"], max_tokens=8, ignore_eos=True, on_text=lambda i, piece: i != 0)
    assert (first.finish_reason, second.finish_reason) == ("cancelled", "length")
    assert second.token_ids == demo.generate("And", max_tokens=8, ignore_eos=True)[0].token_ids


def test_a_prompt_that_begins_like_another_computes_only_what_is_new():
    model = mixtral.Mixtral.from_config(tiny_config(window=0), page_size=4)
    prompt = [3 + i % 50 for i in range(30)]
    first = model.generate(prompt, max_tokens=9, ignore_eos=True)[0]
    assert model.timings.cached_tokens == 0
    longer = [*prompt, *first.token_ids, 5, 6]
    again = model.generate(longer, max_tokens=8, ignore_eos=True)[0]
    assert model.timings.cached_tokens == 36 < model.timings.prompt_tokens == len(longer)  # of 38 that were computed
    without = mixtral.Mixtral.from_config(tiny_config(window=0), prefix_cache=False)
    assert again.token_ids == without.generate(longer, max_tokens=8, ignore_eos=True)[0].token_ids
    without.generate(longer, max_tokens=8)
    assert without.timings.cached_tokens == 0
    stats = model._engine.stats()
    assert (stats.prefix_hits, stats.prefix_queries, stats.preemptions, stats.running) == (36, 71, 0, 0)
    assert stats.computed_tokens == 30 + 8 + 5 + 7 and stats.pages_in_use == 0 < stats.pages_cached < stats.pages


def test_a_cache_beyond_its_limit_is_a_memory_error():
    model = mixtral.Mixtral.from_config(tiny_config(window=0), kv_memory=20_000)
    with pytest.raises(MemoryError, match="lower max_tokens or raise kv_memory"):
        model.generate([5], max_tokens=200)
    assert len(model.generate([5], max_tokens=20, ignore_eos=True)[0].token_ids) == 20
    for wrong in (-1, 1):
        with pytest.raises(ValueError, match="kv_memory"):
            mixtral.Mixtral.from_config(tiny_config(), kv_memory=wrong)
    with pytest.raises(MemoryError, match="available"):
        mixtral.Mixtral.from_config(tiny_config(), kv_memory=1 << 50)


def test_a_full_engine_takes_no_request_until_a_seat_is_free():
    model = mixtral.Mixtral.from_config(tiny_config(), max_queue=2)
    seats = model._engine.reserve_seats(2)
    with pytest.raises(mixtral.QueueFull, match="2 of 2 places"):
        model.generate([3], max_tokens=2)
    del seats[0]
    assert len(model.generate([3], max_tokens=2, ignore_eos=True)[0].token_ids) == 2
    for call in (lambda: model.generate([[3], [4]], max_tokens=2), lambda: model._engine.reserve_seats(2)):
        with pytest.raises(mixtral.QueueFull):
            call()
    with pytest.raises(ValueError, match="at most 2 at a time"):
        model._engine.reserve_seats(3)
    assert model._engine.stats().seats_taken == 1
    assert len(model.generate([3], max_tokens=2, ignore_eos=True)[0].token_ids) == 2  # what was refused holds no seat


def test_prompts_beyond_the_tokens_of_the_queue_are_refused():
    model = mixtral.Mixtral.from_config(tiny_config(), max_queue_tokens=10)
    reads, go_on = threading.Event(), threading.Event()

    def stop_in_its_pass(*_):
        reads.set()
        go_on.wait(60)

    first = threading.Thread(
        target=model.generate, args=([[3] * 6],), kwargs={"max_tokens": 1, "on_text": stop_in_its_pass}
    )
    first.start()
    assert reads.wait(60)
    try:
        with pytest.raises(mixtral.QueueFull, match="6 of 10 tokens"):
            model.generate([[3] * 5], max_tokens=1)
        with pytest.raises(ValueError, match=r"at most 10 tokens \(max_queue_tokens\), got 11"):
            model.generate([[3] * 11], max_tokens=1)
    finally:
        go_on.set()
        first.join()
    assert len(model.generate([[3] * 10], max_tokens=1, ignore_eos=True)[0].token_ids) == 1  # nothing is left of those
    assert model._engine.stats().seats_taken == 0


def test_an_error_in_on_text_reaches_the_caller_and_leaves_the_model_usable(demo):
    def fail(index, piece):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        demo.generate("The", max_tokens=4, on_text=fail)
    assert demo.generate("The", max_tokens=4, ignore_eos=True)[0].finish_reason == "length"


def test_threads_may_generate_with_one_model(tiny):
    expected = [tiny.generate([n], max_tokens=20, ignore_eos=True)[0].token_ids for n in range(4)]
    found = [None] * 4

    def work(n):
        found[n] = tiny.generate([n], max_tokens=20, ignore_eos=True)[0].token_ids

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


# ---- streaming -------------------------------------------------------------------------------------------------------


def test_stream_yields_the_text_piece_by_piece(demo):
    pieces = list(demo.stream("The", max_tokens=24))
    assert len(pieces) > 1 and all(pieces)
    assert "".join(pieces) == demo.generate("The", max_tokens=24)[0].text


def test_closing_a_stream_ends_the_work(demo):
    stream = demo.stream("The", max_tokens=4000, ignore_eos=True)
    next(stream)
    begin = time.monotonic()
    stream.close()
    assert time.monotonic() - begin < 5
    assert not [thread for thread in threading.enumerate() if thread.name == "mixtral-stream"]
    assert demo.timings.new_tokens < 4000


def test_errors_of_a_stream_reach_the_reader(demo):
    with pytest.raises(ValueError, match="top_p"):
        next(demo.stream("The", top_p=2.0))
    small = mixtral.Mixtral(demo._model, demo.tokenizer, kv_memory=50_000)  # a page
    with pytest.raises(MemoryError, match="kv_memory"):
        next(small.stream("The"))


def test_streams_run_side_by_side(demo):
    expected = ["".join(demo.stream(prompt, max_tokens=16)) for prompt in ("The", "And")]
    streams = [demo.stream(prompt, max_tokens=16) for prompt in ("The", "And")]
    texts = ["", ""]
    for _ in range(17):
        texts = [text + next(stream, "") for text, stream in zip(texts, streams, strict=True)]
    assert texts == expected


@pytest.mark.parametrize("leave", ["", "raise SystemExit(0)", "stream = [stream]; stream.append(stream)"])
def test_the_interpreter_exits_with_a_stream_open(leave):
    code = f"""
import mixtral
model = mixtral.Mixtral.from_pretrained({str(DEMO)!r})
stream = model.stream("The", max_tokens=4000, ignore_eos=True)
next(stream)
print("open", flush=True)
{leave}
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (run.stdout, run.stderr, run.returncode) == ("open\n", "", 0)


@pytest.mark.parametrize(
    "call",
    [
        "model.generate([1], max_tokens=100_000, ignore_eos=True)",
        "list(model.stream('The', max_tokens=100_000, ignore_eos=True))",
    ],
)
def test_ctrl_c_ends_generation(call):
    code = f"""
import json, mixtral, pathlib, shutil, sys, tempfile
folder = pathlib.Path(tempfile.mkdtemp())
shutil.copytree({str(DEMO)!r}, folder, dirs_exist_ok=True)
config = json.loads((folder / "config.json").read_text()) | {{"max_position_embeddings": 200_000}}
(folder / "config.json").write_text(json.dumps(config))
model = mixtral.Mixtral.from_pretrained(folder)
shutil.rmtree(folder)
print("ready", flush=True)
try:
    {call}
except KeyboardInterrupt:
    print("interrupted")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job inherits it as ignored
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert (out, process.returncode) == ("interrupted\n", 0)


@pytest.mark.parametrize("prompts", [None, 5, b"Once", {"input_ids": [[1, 2]]}, [1.5, 2.5], [None], np.array([1.5])])
def test_prompts_of_other_types_are_named(tiny, prompts):
    with pytest.raises(TypeError, match="prompts expected text, token ids, or several of these, got ") as error:
        tiny.generate(prompts)
    assert ("input_ids" in str(error.value)) == isinstance(prompts, dict)


def test_a_lone_surrogate_is_named(demo):
    with pytest.raises(ValueError, match="position 1: surrogates not allowed"):
        demo.generate("a\ud800b")


def test_an_argument_of_another_type_is_named(tiny):
    with pytest.raises(TypeError, match="max_tokens: not a value for this argument: 'many'"):
        tiny.generate([1], max_tokens="many")
    with pytest.raises(TypeError, match="temperature: .*'hot'"):
        tiny.generate([1], temperature="hot")


def test_seed_minus_one_is_a_new_seed_each_time(tiny):
    options = {"max_tokens": 20, "temperature": 1.0, "ignore_eos": True}
    results = [tiny.generate([1], seed=-1, **options)[0].token_ids for _ in range(2)]
    assert results[0] != results[1]


def test_a_callback_that_returns_nothing_goes_on(demo):
    pieces = []
    out = demo.generate("Once", max_tokens=8, ignore_eos=True, on_text=lambda index, text: pieces.append(text))[0]
    assert out.finish_reason == "length" and "".join(pieces) == out.text


FORK = """
import os, sys, torch, mixtral
model = mixtral.Mixtral.from_pretrained({demo!r})
model.generate("Once", max_tokens=2)
child = os.fork()
if child == 0:
    uses = [lambda: model.generate("Once"), lambda: model.perplexity("Once"), lambda: next(model.stream("Once")),
            lambda: model(torch.tensor([[1]])),
            lambda: model._engine.generate([[1]], mixtral._C.SamplingParams(), 0, False, None)]
    for use in uses:
        try:
            use()
        except RuntimeError as error:
            assert "forked" in str(error), error
            print("refused", flush=True)
    sys.exit()
_, status = os.waitpid(child, 0)
assert status == 0
assert model.generate("Once", max_tokens=2)[0].token_ids
"""


def run_script(script: str) -> str:
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout


def test_a_fork_of_a_used_model_raises_and_ends():
    assert run_script(FORK.format(demo=str(DEMO))) == "refused\n" * 5


def test_a_stream_left_open_ends_with_the_interpreter():
    script = """
import mixtral
model = mixtral.Mixtral.from_pretrained({demo!r})
stream = model.stream("Once", max_tokens=3000, ignore_eos=True)
print(bool(next(stream)))
"""
    assert run_script(script.format(demo=str(DEMO))) == "True\n"


def test_a_saved_prompt_cache_goes_on_in_another_model_to_the_same_bits(tmp_path):
    def windowed(window: int) -> mixtral.Mixtral:
        return mixtral.Mixtral.from_config(tiny_config(window=window))

    model = windowed(24)
    prompt = [3 + i % 50 for i in range(70)]
    whole = model.generate(prompt, max_tokens=20, logprobs=1, ignore_eos=True)[0]
    longer = prompt + whole.token_ids[:12]
    model.save_prompt_cache(longer, tmp_path / "s.cache")
    other = windowed(24)
    other.load_prompt_cache(tmp_path / "s.cache")
    out = other.generate(longer, max_tokens=8, logprobs=1, ignore_eos=True)[0]
    assert other.timings.cached_tokens == 80  # of 82
    assert out.token_ids == whole.token_ids[12:]
    assert [p.logprob for p in out.logprobs] == [p.logprob for p in whole.logprobs[12:]]
    with pytest.raises(mixtral.LoadError, match="another model"):
        windowed(25).load_prompt_cache(tmp_path / "s.cache")
    assert [path.name for path in tmp_path.iterdir()] == ["s.cache"]
