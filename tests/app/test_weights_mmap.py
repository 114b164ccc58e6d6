"""`--weights mmap`: the same tokens from mapped files, also with less memory than the model has weights."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mixtral as python_mixtral
from binary import BINARY, DEMO, environment, mixtral, ok, ok_json
from cgroups import NoControlGroup, memory_limit

IDS = torch.randint(3, 4096, (2, 30), generator=torch.Generator().manual_seed(1))
PROMPT = ["-p", "Once upon a time", "-n", "12"]


def assert_fails(run: subprocess.CompletedProcess, code: int, *words: str) -> None:
    message = run.stderr.decode()
    assert run.returncode == code and message.count("\n") == 1, message
    for word in words:
        assert word in message


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16", "int8", "fp8", "int4"])
def packed(request, tmp_path_factory) -> Path:
    """The demo model packed; the name of the folder is the dtype."""
    out = tmp_path_factory.mktemp("packed") / request.param
    ok("quantize", DEMO, out, "--dtype", request.param)
    return out


def test_mapped_and_read_weights_give_the_same_bits(packed):
    read = python_mixtral.Mixtral.from_pretrained(packed)
    direct = python_mixtral.Mixtral.from_pretrained(packed, weights="direct")
    mapped = python_mixtral.Mixtral.from_pretrained(packed, weights="mmap")
    original = python_mixtral.Mixtral.from_pretrained(DEMO, dtype=packed.name)
    assert mapped.weight_type == packed.name
    for other in (mapped, direct, read):
        assert torch.equal(other(IDS), original(IDS))
    ours, theirs = mapped.named_parameters(), original.named_parameters()
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert ours[name].dtype == weight.dtype and torch.equal(ours[name], weight), name


def test_every_command_gives_what_it_gives_for_weights_that_are_read(packed, tmp_path):
    (tmp_path / "text").write_text("And it came to pass in those days")
    expected = ok("generate", DEMO, "--dtype", packed.name, *PROMPT)
    scores, chats = [], []
    for weights in ("read", "direct", "mmap"):
        flags = ["--weights", weights]
        assert ok("generate", packed, *PROMPT, *flags) == expected
        scores.append(ok_json("perplexity", packed, tmp_path / "text", *flags)["nats_per_token"])
        chats.append(ok("chat", packed, *flags, "-n", "5", "--temp", "0", stdin=b"Hello\n"))
    assert scores[0] == scores[1] == scores[2]
    assert chats[0] == chats[1] == chats[2] != b""


def test_bench_counts_the_choices_of_mapped_experts(packed):
    sizes = ["--prompt-tokens", "8", "--new-tokens", "3", "--repeat", "2", "--batch", "2"]
    mapped = ok_json("bench", packed, *sizes, "--weights", "mmap")
    assert mapped["dtype"] == packed.name
    config = json.loads((packed / "config.json").read_text())
    choices = config["num_hidden_layers"] * config["num_experts_per_tok"]
    counts = mapped["expert_counts"]
    assert counts["hits"] + counts["misses"] == 2 * 2 * (8 + 3 - 1) * choices  # the last token is not read
    assert (counts["bytes"] > 0) == (counts["misses"] > 0)
    assert "expert_counts" not in ok_json("bench", packed, *sizes)


def test_tensors_of_whole_pages_begin_at_a_page(packed):
    """So that dropping or reading an expert touches no other tensor."""
    with open(packed / "model.safetensors", "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    assert (8 + header_bytes) % 4096 == 0
    weights = python_mixtral.Mixtral.from_pretrained(packed, weights="mmap").named_parameters()
    whole = [weight for weight in weights.values() if weight.nbytes % 4096 == 0]
    assert whole and all(weight.data_ptr() % 4096 == 0 for weight in whole)


def test_a_converted_folder_is_mapped_but_for_its_routers(tmp_path):
    ok("convert", DEMO, tmp_path / "plain")
    original = python_mixtral.Mixtral.from_pretrained(DEMO, pack=False)
    with pytest.warns(UserWarning, match="are read, not mapped, among them layers.0.moe.router"):
        mapped = python_mixtral.Mixtral.from_pretrained(tmp_path / "plain", weights="mmap")
    assert torch.equal(mapped(IDS), original(IDS))
    for name, weight in original.named_parameters().items():
        assert torch.equal(mapped.named_parameters()[name], weight), name


# ---- what fails ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_mapped_says_what_to_do(tmp_path):
    """The bundled model is in the spelling of transformers, which keeps gate and up apart."""
    advice = "`mixtral quantize MODEL OUT --dtype"
    assert_fails(mixtral("generate", DEMO, *PROMPT, "--weights", "mmap"), 2, "weights mmap", "gate_up_proj", advice)
    with pytest.raises(ValueError, match="not packed in the files.*--dtype int4"):
        python_mixtral.Mixtral.from_pretrained(DEMO, dtype="int4", weights="mmap")
    ok("convert", DEMO, tmp_path / "plain")
    with pytest.raises(ValueError, match="in the files and F16 in the model"):
        python_mixtral.Mixtral.from_pretrained(tmp_path / "plain", dtype="float16", weights="mmap")


def test_wrong_options_are_named():
    assert_fails(mixtral("generate", DEMO, *PROMPT, "--weights", "none"), 2, "--weights", "none")
    with pytest.raises(ValueError, match="weights must be read, direct or mmap, got none"):
        python_mixtral.Mixtral.from_pretrained(DEMO, weights="none")
    with pytest.raises(ValueError, match="check_weights"):
        python_mixtral.Mixtral.from_pretrained(DEMO, weights="mmap", check_weights=True)


def test_a_file_cut_short_while_it_is_used_ends_with_a_message(tmp_path):
    ok("quantize", DEMO, tmp_path / "model", "--dtype", "float32")
    weights = tmp_path / "model" / "model.safetensors"
    command = [BINARY, "chat", tmp_path / "model", "--weights", "mmap", "-n", "5"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, env=environment(), **pipes) as chat:
        chat.stdin.write(b"Hello\n")
        chat.stdin.flush()
        assert chat.stdout.read(1)  # the model has answered
        os.truncate(weights, 8192)
        _, error = chat.communicate(b"Hello\n", timeout=60)
    assert chat.returncode == 3 and b"cut short" in error and error.count(b"\n") == 1, error


def test_packed_floats_are_for_the_cpu(tmp_path):
    ok("quantize", DEMO, tmp_path / "model", "--dtype", "bfloat16")
    assert_fails(mixtral("generate", tmp_path / "model", *PROMPT, "--dtype", "float16"), 2, "packed as bfloat16")
    assert_fails(mixtral("convert", tmp_path / "model", tmp_path / "out"), 2, "packed as bfloat16", "was made from")
    assert not (tmp_path / "out").exists()


# ---- less memory than weights ----------------------------------------------------------------------------------------


# Of the library, and in config.json.
SIZES = dict(hidden_size=1024, intermediate_size=3584, num_layers=8, num_heads=16, num_kv_heads=4, head_dim=64)
SIZES |= dict(vocab_size=4096, max_position=2048, num_experts=8, top_k=2, rms_norm_eps=1e-5, rope_theta=1e6)
NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "max_position": "max_position_embeddings",
    "num_experts": "num_local_experts",
    "top_k": "num_experts_per_tok",
}
OTHER_FIELDS = {
    "model_type": "mixtral",
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "sliding_window": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "quantization_config": {"format": "mixtral", "dtype": "int8"},
}


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """700 MB of int8 weights, random, with the tokenizer of the demo model."""
    folder = tmp_path_factory.mktemp("large") / "model"
    model = python_mixtral.Mixtral.from_config(python_mixtral.Config(**SIZES), dtype="int8")
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    save_file(model.named_parameters(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(OTHER_FIELDS | {NAMES.get(n, n): v for n, v in SIZES.items()}))
    return folder


def drop_from_memory(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_a_model_of_twice_the_memory_generates_the_same_tokens(large):
    weights = large / "model.safetensors"
    arguments = ["generate", large, "-p", "Once", "-n", "64", "--ignore-eos", "-c", "256", "--weights", "mmap"]
    expected = ok(*arguments)
    drop_from_memory(weights)
    limit = weights.stat().st_size // 2
    try:
        with memory_limit(limit) as group:
            limited = ok(*arguments, preexec_fn=group.enter)
            peak = group.peak()
    except NoControlGroup as reason:
        pytest.skip(str(reason))
    assert limited == expected  # so nothing was ended for lack of memory
    assert limit * 0.9 < peak <= limit  # the limit was felt, and held
