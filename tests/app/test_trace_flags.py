"""`--trace`, `--replay` and `--experts-per-token`."""

from pathlib import Path

import pytest
import torch

import mixtral as package
from binary import DEMO, mixtral, ok, ok_json

PROMPT = "Once upon a time there was a king who had three daughters."


def generate(*arguments: str | Path, prompt: str = PROMPT) -> dict:
    return ok_json("generate", "-p", prompt, "-n", "12", "--ignore-eos", "--logprobs", "2", *arguments)


def refused(code: int, *arguments: str | Path) -> str:
    run = mixtral(*arguments)
    assert (run.returncode, run.stdout) == (code, b"") and run.stderr.count(b"\n") == 1, run.stderr
    return run.stderr.decode()


def shift_experts(path: Path, token: int) -> None:
    trace = package.Trace.load(path)
    trace.topk_ids[token] = (trace.topk_ids[token] + 1) % trace.num_experts
    trace.save(path)


def test_a_trace_holds_what_the_model_read_and_replay_changes_no_bit(tmp_path):
    path = tmp_path / "t.safetensors"
    plain, traced = generate(), generate("--trace", path)
    replayed = generate("--replay", path)
    for result in (traced, replayed):
        assert result["token_ids"] == plain["token_ids"] and result["logprobs"] == plain["logprobs"]
    trace = package.Trace.load(path)
    read = plain["prompt_token_ids"] + plain["token_ids"][:-1]
    assert trace.token_ids.tolist() == read
    assert trace.positions.tolist() == list(range(len(read)))
    assert trace.special.tolist() == [True] + [False] * (len(read) - 1)
    prompt = len(plain["prompt_token_ids"])
    assert trace.predicted_ids.tolist() == [-1] * (prompt - 1) + plain["token_ids"]
    model = package.Mixtral.from_pretrained(DEMO)
    expected = model.trace(read)
    assert torch.equal(trace.topk_ids, expected.topk_ids) and torch.equal(trace.topk_weights, expected.topk_weights)
    assert (trace.model, trace.tokenizer) == (expected.model, expected.tokenizer)


def test_one_altered_expert_changes_the_generation(tmp_path):
    path = tmp_path / "t"
    plain = generate("--trace", path)
    shift_experts(path, 4)
    assert generate("--replay", path)["logprobs"] != plain["logprobs"]


def test_a_replay_ends_where_the_tokens_differ(tmp_path):
    path = tmp_path / "t"
    generate("--trace", path, "--temp", "5", "--seed", "1")
    last = len(package.Trace.load(path)) - 1
    shift_experts(path, last)  # of a token that the most likely answer does not have
    assert generate("--replay", path)["logprobs"] == generate()["logprobs"]


@pytest.mark.parametrize("layout", [["--tp", "2"], ["--pp", "2"], ["--tp", "2", "--pp", "2"]], ids=" ".join)
def test_traces_are_those_of_one_process_and_are_replayed_in_every_layout(layout, text, tmp_path):
    one, split = tmp_path / "one", tmp_path / "split"
    plain = generate("--trace", one)
    assert generate("--trace", split, *layout)["logprobs"] == plain["logprobs"]
    assert split.read_bytes() == one.read_bytes()
    assert generate("--replay", one, *layout)["logprobs"] == plain["logprobs"]
    shift_experts(one, 4)
    forced = generate("--replay", one)["logprobs"]
    assert generate("--replay", one, *layout)["logprobs"] == forced != plain["logprobs"]
    bits = perplexity(text, "--trace", one)
    assert perplexity(text, "--trace", split, *layout) == bits and split.read_bytes() == one.read_bytes()


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("And it came to pass in those days, that there went out a decree. " * 5)
    return path


def perplexity(text: Path, *arguments: str | Path) -> float:
    return ok_json("perplexity", text, *arguments)["nats_per_token"]


def test_perplexity_is_traced_and_replayed_in_chunks_of_any_size(text, tmp_path):
    path = tmp_path / "t"
    flags = ["--ctx-size", "30"]
    plain = perplexity(text, *flags)
    assert perplexity(text, "--trace", path, *flags) == plain
    assert perplexity(text, "--replay", path, "--chunk-size", "7", *flags) == plain
    trace = package.Trace.load(path)
    model = package.Mixtral.from_pretrained(DEMO)
    sequences = [ids.tolist() for ids in trace.token_ids.tensor_split(torch.where(trace.positions == 0)[0][1:])]
    expected = model.trace(sequences)
    assert torch.equal(trace.topk_ids, expected.topk_ids)
    assert torch.equal(trace.predicted_ids, expected.predicted_ids)
    shift_experts(path, 3)
    assert perplexity(text, "--replay", path, *flags) != plain


def test_another_number_of_experts_is_traced_and_replayed_without_naming_it(text, tmp_path):
    one = perplexity(text, "--experts-per-token", "1", "--trace", tmp_path / "t")
    assert one > perplexity(text) and package.Trace.load(tmp_path / "t").topk_ids.shape[2] == 1
    assert perplexity(text, "--replay", tmp_path / "t") == one
    first = generate("--experts-per-token", "1", "--trace", tmp_path / "g")
    assert first["logprobs"] == generate("--replay", tmp_path / "g")["logprobs"] != generate()["logprobs"]


def test_chat_and_bench_take_another_number_of_experts():
    chat = ["chat", "--temp", "0", "-n", "20"]
    assert ok(*chat, "--experts-per-token", "1", stdin=b"Hi\n") != ok(*chat, stdin=b"Hi\n")
    bench = ["bench", "--prompt-tokens", "4", "--new-tokens", "2", "--repeat", "1"]
    two, one = ok_json(*bench), ok_json(*bench, "--experts-per-token", "1")
    assert one["weight_bytes_per_token"] < two["weight_bytes_per_token"]


BENCH = ["bench", "--prompt-tokens", "5", "--new-tokens", "4", "--repeat", "2"]


def test_a_trace_of_bench_has_a_document_for_each_prompt(tmp_path):
    path = tmp_path / "t"
    assert "replayed_tokens" not in ok_json(*BENCH, "--batch", "3", "--trace", path)
    trace = package.Trace.load(path)
    assert trace.positions.tolist() == [*range(8)] * 3 and trace.docs.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    model = package.Mixtral.from_pretrained(DEMO)
    sequences = trace.token_ids.view(3, 8).tolist()
    assert len({tuple(ids) for ids in sequences}) == 3
    expected = model.trace(sequences)
    assert torch.equal(trace.topk_ids, expected.topk_ids) and trace.model == expected.model
    for ids in sequences:
        assert model.generate([ids[:5]], max_tokens=4, ignore_eos=True)[0].token_ids[:3] == ids[5:]


def test_bench_replays_its_prompts_and_says_how_many_tokens(tmp_path):
    path, again = tmp_path / "t", tmp_path / "again"
    ok(*BENCH, "--batch", "3", "--trace", path)
    assert ok_json(*BENCH, "--batch", "2", "--replay", path)["replayed_tokens"] == 16
    said = ok(*BENCH, "--batch", "3", "--replay", path)
    assert b"replayed          24 tokens    (of the 24 that the model read)" in said
    trace = package.Trace.load(path)
    trace.topk_ids[0] = 7 - trace.topk_ids[0]  # of the first token of the first prompt, in every layer
    trace.save(path)
    forced = ok_json(*BENCH, "--batch", "3", "--replay", path, "--trace", again)["replayed_tokens"]
    second = package.Trace.load(again)
    assert 21 <= forced <= 24  # all prompts, and new tokens for as long as they are those of the trace
    assert second.topk_ids[0].sort().values.equal(trace.topk_ids[0].sort().values)
    same = (second.token_ids == trace.token_ids).view(3, 8).long().cumprod(1)
    assert same.sum() == forced and same[1:].all()


def test_bench_counts_the_experts_of_the_replay(tmp_path):
    one = ok_json(*BENCH, "--experts-per-token", "1", "--trace", tmp_path / "t")
    replayed = ok_json(*BENCH, "--replay", tmp_path / "t")
    assert replayed["weight_bytes_per_token"] == one["weight_bytes_per_token"]
    conflict = refused(2, *BENCH, "--replay", tmp_path / "t", "--experts-per-token", "2")
    assert "experts_per_token must be that of the trace, 1, got 2" in conflict


def test_traces_that_bench_cannot_replay_are_refused_in_one_line(tmp_path):
    path = tmp_path / "t"
    ok(*BENCH, "--trace", path)
    longer = ["bench", "--prompt-tokens", "9", "--new-tokens", "4"]
    for other in ([*BENCH, "--batch", "2"], longer):
        assert "is not of these prompts" in refused(2, *other, "--replay", path)
    assert "is a trace of another model" in refused(3, *BENCH, "--dtype", "int8", "--replay", path)
    assert "none" in refused(3, *BENCH, "--replay", tmp_path / "none")
    trace = package.Trace.load(path)
    trace.positions[3] = 5
    trace.save(path)
    assert "position must count from 0 in each sequence, got 5 at token 3" in refused(3, *BENCH, "--replay", path)


def test_wrong_numbers_of_experts_are_usage_errors():
    assert "must be >= 1, got 0" in refused(2, "generate", "-p", "a", "--experts-per-token", "0")
    assert "experts_per_token must be in [1, 8], got 9" in refused(2, "generate", "-p", "a", "--experts-per-token", "9")


def test_traces_that_do_not_fit_are_refused_in_one_line(text, tmp_path):
    path = tmp_path / "t.safetensors"
    generate("--trace", path)
    again = ["generate", "-p", PROMPT, "-n", "2", "--replay"]
    assert "t.safetensors: is a trace of another model" in refused(3, *again, path, "--dtype", "int8")
    other = refused(2, "generate", "-p", PROMPT.replace("king", "queen"), "-n", "2", "--replay", path)
    assert "in the trace it is" in other and "replay the traced text" in other
    assert "replay: token" in refused(2, "perplexity", text, "--replay", path)
    ok("generate", "-p", PROMPT, "-n", "1", "--trace", tmp_path / "short")  # of the prompt alone
    longer = ["generate", "-p", PROMPT + " More", "-n", "2", "--replay", tmp_path / "short"]
    assert "the trace ends after" in refused(2, *longer)
    assert "excludes" in refused(2, *again, path, "--prompt-cache", tmp_path / "c")
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert "is cut short" in refused(3, *again, path)
    path.write_bytes(b"\x7fELF" + bytes(range(256)) * 4)
    assert "t.safetensors" in refused(3, *again, path)
    assert "none" in refused(3, *again, tmp_path / "none")
    assert "no trace" in refused(3, *again, DEMO / "model.safetensors")


def test_a_trace_that_cannot_be_written_is_refused_before_the_work(text, tmp_path):
    missing = tmp_path / "no" / "t"
    for command in (["generate", "-p", "a", "-n", "2"], BENCH, ["perplexity", text]):
        assert f"--trace: cannot write {missing}" in refused(2, *command, "--trace", missing)
    assert f"--trace: cannot write {tmp_path}" in refused(2, "generate", "-p", "a", "--trace", tmp_path)
    assert not missing.parent.exists()
