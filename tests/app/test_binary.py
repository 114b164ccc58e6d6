"""What the commands of the `mixtral` binary print."""

import json
import math
import re
from pathlib import Path

import pytest

from binary import DEMO, edit_config, environment, mixtral, ok, ok_json

MIXTRAL_8X7B = {
    "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8,
    "num_experts_per_tok": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
    "sliding_window": None, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def big_model(tmp_path: Path) -> Path:
    """The configuration of Mixtral 8x7B, without weights."""
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL_8X7B))
    return tmp_path


# ---- generate --------------------------------------------------------------------------------------------------------


def test_json_has_the_documented_shape():
    result = ok_json("generate", "-p", "Once upon a time", "-n", "12", "--ignore-eos", "--logprobs", "3")
    assert set(result) == {"text", "prompt_token_ids", "token_ids", "finish_reason", "timings", "logprobs"}
    assert len(result["token_ids"]) == 12 and result["finish_reason"] == "length"
    assert result["prompt_token_ids"][0] == 1
    for chosen, token_id in zip(result["logprobs"], result["token_ids"], strict=True):
        best = chosen["top"][0]
        assert chosen["token_id"] == token_id == best["token_id"] and len(chosen["top"]) == 3  # greedy
        assert chosen["logprob"] == best["logprob"] <= 0
    timings = result["timings"]
    assert timings["prompt_tokens"] == len(result["prompt_token_ids"]) and timings["new_tokens"] == 12
    for name in ["load", "prefill", "decode"]:
        assert timings[f"{name}_seconds"] > 0
    for name in ["prefill", "decode"]:
        assert timings[f"{name}_tokens_per_second"] > 0


def test_streams_the_text_of_the_json_object():
    arguments = ["generate", "-p", "Once upon a time", "-n", "20"]
    assert ok(*arguments).decode() == ok_json(*arguments)["text"] + "\n"


def test_reads_the_prompt_from_flag_file_or_stdin(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"Once upon\na time\n")
    from_flag = ok("generate", "-n", "4", "-p", "Once upon\na time")
    assert ok("generate", "-n", "4", "-f", file) == from_flag
    assert ok("generate", "-n", "4", stdin=file.read_bytes()) == from_flag


def test_text_saved_on_windows_is_read_like_any_other(tmp_path):
    expected = ok("tokenize", "-p", "Once upon\na time")
    windows = b"\xef\xbb\xbfOnce upon\r\na time\r\n"
    (tmp_path / "prompt.txt").write_bytes(windows)
    assert ok("tokenize", "-f", tmp_path / "prompt.txt") == expected
    assert ok("tokenize", stdin=windows) == expected
    assert ok("tokenize", stdin=b"a\rb\r") == ok("tokenize", "-p", "a\rb\r")  # alone it is a character like any other


def test_escapes_stand_for_characters_where_asked():
    plain = ok("tokenize", "-p", "a\\nb")
    escaped = ok("tokenize", "-e", "-p", r"a\nb\t\\\"\q")
    assert escaped == ok("tokenize", "-p", 'a\nb\t\\"\\q') and escaped != plain
    arguments = ["generate", "-p", "CHAPTER", "-n", "60", "--ignore-eos"]
    before, newline, _ = ok_json(*arguments)["text"].partition("\n")
    assert before and newline
    stopped = ok_json(*arguments, "--stop", r"\n")
    assert stopped["text"] == before and stopped["finish_reason"] == "stop"


def test_new_tokens_nobody_asked_for_are_as_many_as_the_context_leaves():
    result = ok_json("generate", "-p", "one two three", "-c", "16", "--ignore-eos")
    assert len(result["prompt_token_ids"]) + len(result["token_ids"]) == 16


def test_seed_minus_one_is_a_new_seed_each_time():
    arguments = ["generate", "-p", "Once", "-n", "24", "--temp", "1.5", "--ignore-eos", "--seed"]
    assert ok(*arguments, "-1") != ok(*arguments, "-1")
    assert ok(*arguments, "7") == ok(*arguments, "7")


def test_stop_string_ends_the_text_before_it():
    whole = ok_json("generate", "-p", "Once upon a time", "-n", "20", "--ignore-eos")["text"]
    stop = whole[len(whole) // 2 :][:3]
    result = ok_json("generate", "-p", "Once upon a time", "-n", "20", "--ignore-eos", "--stop", "@@@", "--stop", stop)
    assert result["text"] == whole[: whole.index(stop)] and result["finish_reason"] == "stop"


def test_same_seed_gives_the_same_bytes_whatever_the_threads_and_chunks():
    arguments = ["generate", "-p", "Once upon a time", "-n", "40", "--ignore-eos", "--temp", "1", "--seed", "7"]
    outputs = {ok(*arguments, "-t", threads) for threads in ["1", "2", "1", "2"]}
    outputs.add(ok(*arguments, "--chunk-size", "3"))
    assert len(outputs) == 1
    assert ok(*arguments[:-1], "8") not in outputs


def test_cuda_graphs_may_be_turned_off():
    arguments = ["-p", "Once upon a time", "-n", "4"]
    assert ok("generate", *arguments, "--no-cuda-graph") == ok("generate", *arguments)
    for command in ["chat", "bench"]:
        assert b"--no-cuda-graph" in ok(command, "--help")
    assert mixtral("tokenize", "-p", "a", "--no-cuda-graph").returncode == 2


def test_flags_may_come_from_the_environment():
    tokens = ok_json("generate", "-p", "Once", "--ignore-eos", env=environment(MIXTRAL_MAX_TOKENS="3"))["token_ids"]
    assert len(tokens) == 3


def test_timings_go_to_stderr_on_request():
    assert b"tokens/s" in mixtral("generate", "-p", "Once", "-n", "2", "-v").stderr


def test_prompt_may_be_any_bytes():
    assert ok_json("tokenize", "-p", b"\xff\xfe", "--no-bos")["pieces"][-2:] == ["<0xFF>", "<0xFE>"]
    assert "<0x00>" in ok_json("tokenize", stdin=b"a\0b")["pieces"]
    ok("generate", "-p", b"\xff\xfe", "-n", "2")


# ---- the other commands ----------------------------------------------------------------------------------------------


def test_info_of_mixtral_8x7b_needs_no_weights(big_model):
    info = ok_json("info", big_model)
    assert info["total_parameters"] == 46_702_792_704 and info["active_parameters"] == 12_879_925_248
    assert info["window"] == 0 and info["window_source"]
    memory = info["memory"]
    router = 32 * 8 * 4096  # in float32, whatever the weights are
    assert memory["weights_bytes"] == memory["weights_bytes_by_dtype"]["bfloat16"] == 2 * 46_702_792_704 + 2 * router
    assert memory["weights_bytes_by_dtype"]["float32"] == 4 * 46_702_792_704
    assert memory["kv_bytes_per_token"] == 2 * 2 * 32 * 8 * 128  # keys and values, bf16, layers, heads, head_dim
    assert memory["ctx_size"] == 32768 and memory["kv_bytes"] >= 32768 * memory["kv_bytes_per_token"]
    assert memory["total_bytes"] == memory["weights_bytes"] + memory["kv_bytes"]
    # In a pass of 512 tokens: the residual and its norm, and per expert input, gate, up, product and output, bf16.
    assert memory["activations_bytes"] == 512 * 2 * (2 * 4096 + 2 * (2 * 4096 + 3 * 14336))
    assert ok_json("info", big_model, "--dtype", "float32")["memory"]["weights_bytes"] == 4 * 46_702_792_704
    assert b"46702792704" in ok("info", big_model)


def test_info_cache_is_bounded_by_the_window(big_model):
    edit_config(big_model, sliding_window=4096)
    info = ok_json("info", big_model, "-c", "1000000")
    assert info["window"] == 4096 and "sliding_window" in info["window_source"]
    assert 4096 <= info["memory"]["cached_tokens"] < 8192


def test_tokenize_shows_ids_and_explains_bos_and_eos():
    ids = ok_json("tokenize", "-p", "Once upon")["token_ids"]
    assert ids[0] == 1
    assert ok("tokenize", "-p", "Once upon").split() == [str(token_id).encode() for token_id in ids]
    assert ok_json("tokenize", "-p", "Once upon", "--no-bos")["token_ids"] == ids[1:]
    assert ok_json("tokenize", stdin=b"Once upon\n")["token_ids"] == ids
    explained = ok_json("tokenize", "-p", "Once upon", "--explain")
    text = bytes.fromhex("".join(explained["bytes"]))
    assert text == b" Once upon" and explained["pieces"][0] == "<s>"
    report = ok("tokenize", "-p", "Once upon", "--explain").decode()
    for token_id, piece in zip(ids, explained["pieces"], strict=True):
        assert f"{token_id}  {piece}  [" in report
    assert "BOS: <s> put before the text" in report and "EOS: none" in report
    assert "--no-bos" in ok_json("tokenize", "-p", "a", "--explain", "--no-bos")["bos"]


def test_tokenize_as_chat_wraps_the_message():
    pieces = ok_json("tokenize", "-p", "Hello", "--chat")["pieces"]
    text = "".join(pieces)
    assert pieces.count("<s>") == 1 and "INST]" in text and "/INST]" in text


def test_bench_reports_rates_and_memory():
    result = ok_json("bench", "--prompt-tokens", "16", "--new-tokens", "4", "--batch", "2", "--repeat", "1")
    for name in ["load_seconds", "prefill_tokens_per_second", "decode_tokens_per_second", "percent_of_roofline"]:
        assert result[name] > 0
    # The process holds the weights: 5.5 M parameters in bf16.
    assert result["peak_memory_bytes"] > 10e6
    one = ok_json("bench", "--prompt-tokens", "4", "--new-tokens", "2", "--repeat", "1")["weight_bytes_per_token"]
    active = ok_json("info")["active_parameters"]
    assert 0.5 * 2 * active < one < 2 * active  # bf16; of the embedding only one row
    assert one / 2 < result["weight_bytes_per_token"] < one  # two tokens share what is not an expert


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("And it came to pass in those days, that there went out a decree.\n" * 8)
    return file


def test_perplexity_reports_the_score_of_a_file(text):
    result = ok_json("perplexity", text)
    tokens = ok_json("tokenize", stdin=text.read_bytes() + b"\n")["token_ids"]  # one newline of stdin is dropped
    assert result["tokens"] == len(tokens) - 1  # BOS is not predicted
    assert result["bytes"] == text.stat().st_size and result["dtype"] == "bfloat16" and result["seconds"] > 0
    assert result["perplexity"] == pytest.approx(math.exp(result["nats_per_token"]))
    bits = result["nats_per_token"] / math.log(2) * result["tokens"] / result["bytes"]
    assert 0 < result["bits_per_byte"] == pytest.approx(bits)
    report = ok("perplexity", text).decode()
    for name in ["nats_per_token", "bits_per_byte"]:
        assert f"{result[name]:.5f}" in report
    assert f"{result['perplexity']:.4f}" in report


def test_perplexity_takes_the_model_as_argument_or_flag(text):
    expected = ok_json("perplexity", text)["bits_per_byte"]
    for arguments in [[DEMO, text], ["-m", DEMO, text], ["--chunk-size", "5", text]]:
        assert ok_json("perplexity", *arguments)["bits_per_byte"] == expected
    variables = environment(MIXTRAL_MODEL="/nonexistent")
    assert ok_json("perplexity", DEMO, text, env=variables)["bits_per_byte"] == expected
    assert b"/nonexistent" in mixtral("perplexity", text, env=variables).stderr
    assert ok_json("perplexity", text, "-c", "4")["bits_per_byte"] > expected + 0.3


def test_perplexity_compares_dtypes(text):
    result = ok_json("perplexity", text, "--compare-dtype", "float32")
    other = ok_json("perplexity", text, "--dtype", "float32")
    assert result["compared_with"]["dtype"] == "float32"
    assert result["compared_with"]["bits_per_byte"] == other["bits_per_byte"] != result["bits_per_byte"]
    difference = 100 * (result["bits_per_byte"] / other["bits_per_byte"] - 1)
    assert result["bits_per_byte_difference_percent"] == pytest.approx(difference) != 0
    report = ok("perplexity", text, "--compare-dtype", "float32").decode()
    assert f"bfloat16 needs {difference:+.3f} % bits per byte against float32" in report


def test_chat_over_a_pipe_answers_line_by_line():
    arguments = ["chat", "--temp", "0", "-n", "8", "--ignore-eos"]
    once = ok(*arguments, stdin=b"Once upon a time\n")
    assert len(once) > 1 and once.endswith(b"\n")
    assert ok(*arguments, stdin=b"Once upon a time\n/clear\nOnce upon a time") == 2 * once
    assert ok(*arguments, stdin=b"\n/bye\nOnce upon a time\n") == b""
    assert ok(*arguments, stdin=b"\xef\xbb\xbf\r\n/exit\r\nOnce upon a time\r\n") == b""
    assert ok(*arguments, stdin=b"Once upon a time\r\n") == ok(*arguments, stdin=b"Once upon a time\n")
    said = b"Once upon a time " * 8 + b"\n"
    twice = mixtral(*arguments, "-v", stdin=2 * said)
    first, second = (int(count) for count in re.findall(rb"prompt (\d+) tokens", twice.stderr))
    assert twice.stdout.startswith(ok(*arguments, stdin=said)) and second > 2 * first  # the history goes in again
    cached = [int(count) for count in re.findall(rb"\((\d+) cached\)", twice.stderr)]
    assert len(cached) == 1 and first - 16 < cached[0] < second  # and is not computed again, but for a part of a page


def test_chat_drops_the_oldest_turns_when_the_context_is_full():
    arguments = ["chat", "--temp", "0", "-n", "8", "--ignore-eos", "-c", "48"]
    assert ok(*arguments, stdin=b"Once upon a time\n" * 6).count(b"\n") >= 6
    refused = mixtral(*arguments, stdin=b"Once " * 60)
    assert refused.returncode == 0 and b"does not fit the context of 48" in refused.stderr


def test_help_and_version():
    assert b"torch 2.11" in ok("--version")
    assert b"generate" in ok("--help")
    for command in ["generate", "chat", "info", "tokenize", "bench", "perplexity"]:
        assert b"Examples:" in ok(command, "-h")
