"""Files made to hurt: each ends in one printable line and exit 3, in less than 5 s and with little memory."""

import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

import mixtral
from binary import BINARY, DEMO, edit_config, environment, ok, ok_json

MIB = 1 << 20
GENERATE = ["-p", "a", "-n", "1", "-t", "1"]


# A process begins with the peak of the one that it is forked from, and that of pytest is high.
RUN_FROM_A_SMALL_PROCESS = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (5, 5))
silent = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=silent)
_, status, usage = os.wait4(pid, 0)
print(os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024)
"""


def limited(command: str, model: Path, *arguments: str) -> tuple[int, str, int]:
    """Exit code, stderr and peak memory in bytes of a command that may take 5 s of processor time."""
    python = [sys.executable, "-I", "-S", "-c", RUN_FROM_A_SMALL_PROCESS]
    run = subprocess.run([*python, BINARY, command, model, *arguments], capture_output=True, env=environment())
    code, memory = map(int, run.stdout.split())
    return code, run.stderr.decode(), memory


def is_printable(text: str) -> bool:
    """Nothing that commands a terminal, separates lines, is invisible or turns the direction of text."""
    return all(unicodedata.category(c) not in ("Cc", "Cf", "Zl", "Zp", "Cs", "Cn") for c in text)


@pytest.fixture(scope="module")
def healthy_memory() -> dict[str, int]:
    """What the commands take where they find nothing: libtorch is most of it."""
    memory = {}
    for command, arguments in [("generate", GENERATE), ("tokenize", ["-p", "a"])]:
        code, _, memory[command] = limited(command, Path("/nonexistent"), *arguments)
        assert code == 3
    return memory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def assert_refused(healthy: dict[str, int], model: Path, size: int, *words: str, command: str = "generate") -> None:
    arguments = GENERATE if command == "generate" else ["-p", "a"]
    code, message, memory = limited(command, model, *arguments)
    assert code == 3, message
    assert message.startswith("mixtral: ") and message.endswith("\n") and is_printable(message[:-1]), message
    assert len(message) < 2048
    for word in words:
        assert word in message
    assert memory - healthy[command] < size + 64 * MIB


def safetensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


TENSOR = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":"' + "é".encode() * 7_000_000 + b'"}',
        b'{"a":"' + b"x" * 15_000_000,
        b'{"a":' + b"1" * 15_000_000 + b"}",
        b'{"a":[' + b"{}," * 1_048_570 + b"{}]}",
        b'{"a":' + b"[" * 15_000_000,
        b"{" + b",".join(b'"%d":' % i + TENSOR for i in range(65_537)) + b"}",
        b"{" + b",".join(b'"%0200d":' % i + TENSOR for i in range(60_000)) + b"}",
        b'{"__metadata__":{' + b",".join(b'"%d":{}' % i for i in range(1 << 17)) + b"}}",
        b'{"a":' + b" " * 15_000_000 + b"}",
        b" " * 40_000_000 + b"{}",
    ],
    ids=[
        "text",
        "open_text",
        "digits",
        "objects",
        "depth",
        "tensors",
        "names",
        "metadata",
        "spaces",
        "header_of_40_MB",
    ],
)
def test_header_that_takes_many_times_its_size(healthy_memory, model, header):
    (model / "model.safetensors").write_bytes(safetensors(header))
    assert_refused(healthy_memory, model, len(header))


@pytest.mark.parametrize(
    "index",
    [
        b'{"weight_map":{' + b",".join(b'"%0100d":"a.safetensors"' % i for i in range(100_000)) + b"}}",
        b'{"weight_map":{' + b",".join(b'"%d":[]' % i for i in range(1 << 17)) + b"}}",
        b'{"weight_map":{"a":"' + b"x" * 15_000_000 + b'"}}',
        b'{"weight_map":{},"a":"' + b"x" * 40_000_000 + b'"}',
    ],
    ids=["tensors", "lists", "long_name", "40_MB"],
)
def test_index_that_takes_many_times_its_size(healthy_memory, model, index):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_bytes(index)
    assert_refused(healthy_memory, model, len(index), "model.safetensors.index.json")


def test_config_that_asks_for_millions_of_tensors(healthy_memory, model):
    sizes = {"hidden_size": 2, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 2}
    edit_config(model, num_hidden_layers=1024, num_local_experts=2048, head_dim=2, **sizes)
    (model / "model.safetensors").write_bytes(safetensors(b"{}"))
    assert_refused(healthy_memory, model, 0, "tensor is missing")


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def all_words(length: int) -> itertools.chain[str]:
    return ("".join(letters) for letters in itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=length))


def too_many_pieces(model: Path) -> int:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {word: 4096 + i for i, word in enumerate(itertools.islice(all_words(5), 1 << 19))}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    (model / "tokenizer.model").unlink()
    return (model / "tokenizer.json").stat().st_size


def open_text(model: Path) -> int:
    (model / "tokenizer.json").write_bytes(b'{"model":{"vocab":{"' + b"x" * 30_000_000)
    (model / "tokenizer.model").unlink()
    return 30_000_000


def empty_objects(model: Path) -> int:
    (model / "tokenizer_config.json").write_bytes(b'{"a":[' + b"{}," * 1_048_570 + b"{}]}")
    return 3 * MIB


def long_id(model: Path) -> int:
    (model / "tokenizer_config.json").write_text('{"added_tokens_decoder":{"' + "\\u009b" * 100_000 + '":{}}}')
    return MIB


def huge_piece(model: Path) -> int:
    (model / "tokenizer.model").write_bytes(b"\x0a\xff\xff\xff\x0e" + b"\x0a\xfa\xff\xff\x0e" + b"x" * 31_457_274)
    return 30 * MIB


@pytest.mark.parametrize("damage", [too_many_pieces, open_text, empty_objects, long_id, huge_piece])
def test_tokenizer_that_takes_many_times_its_size(healthy_memory, model, damage: Callable[[Path], int]):
    size = damage(model)
    assert_refused(healthy_memory, model, size, "tokenizer", command="tokenize")


# ---- names and links -------------------------------------------------------------------------------------------------

WILD = "x\x1b[31m\x7f\u009b31m\u202e\u2066\u200f\u2028\u2029\u061cé"


def test_names_in_files_command_no_terminal(healthy_memory, model):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 9]}
    header = json.dumps({WILD: entry}, ensure_ascii=False).encode()
    (model / "model.safetensors").write_bytes(safetensors(header, b"\0" * 4))
    assert_refused(healthy_memory, model, 0, "x\\u001b[31m\\u007f\\u009b31m\\u202e", "é: data_offsets")


def test_names_of_folders_command_no_terminal(healthy_memory, tmp_path):
    wild = os.fsencode(tmp_path) + b"/" + WILD.encode() + b"\xff"
    os.mkdir(wild)
    assert_refused(healthy_memory, os.fsdecode(wild), 0, "\\u009b31m\\u202e", "é\\xff: holds neither")


def test_pieces_and_warnings_command_no_terminal(model):
    tokens = json.dumps({WILD: 4096, WILD + "2": 5}, ensure_ascii=False)
    (model / "added_tokens.json").write_text(tokens)
    code, message, _ = limited("tokenize", model, "-p", "a")
    assert code == 0 and is_printable(message[:-1]) and "\\u009b" in message, message
    (model / "added_tokens.json").write_text(json.dumps({WILD: 4096}, ensure_ascii=False))
    explained = ok("tokenize", model, "--explain", "-p", WILD).decode()
    assert all(is_printable(line) for line in explained.split("\n")) and "4096  x\\u001b[31m\\u007f\\u009b" in explained
    output = ok("tokenize", model, "--json", "-p", WILD).decode()
    assert is_printable(output[:-1])
    assert WILD in ok_json("tokenize", model, "-p", WILD)["pieces"]


def test_errors_and_notes_in_python_are_printable(model):
    (model / "added_tokens.json").write_text(json.dumps({WILD: 5}, ensure_ascii=False))
    note = mixtral.Tokenizer(model).note
    assert is_printable(note) and "\\u009b31m" in note
    shard = "model-00001-of-00001.safetensors"
    (model / "model.safetensors").rename(model / shard)
    index = {"weight_map": {WILD: shard, "lm_head.weight": shard}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index, ensure_ascii=False))
    with pytest.warns(UserWarning, match="lists tensors that no file holds: x.u001b") as warned:
        mixtral.Mixtral.from_pretrained(model)
    assert all(is_printable(str(warning.message)) for warning in warned)
    (model / shard).write_bytes(safetensors(json.dumps({WILD: {}}, ensure_ascii=False).encode()))
    with pytest.raises(mixtral.LoadError) as error:
        mixtral.Mixtral.from_pretrained(model)
    assert error.value.item == WILD and is_printable(str(error.value))


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("config.json", "generate"),
        ("model.safetensors", "generate"),
        ("model.safetensors.index.json", "generate"),
        ("tokenizer.model", "tokenize"),
        ("tokenizer.json", "tokenize"),
        ("tokenizer_config.json", "tokenize"),
        ("added_tokens.json", "tokenize"),
    ],
)
def test_links_that_go_round(healthy_memory, model, name, command):
    goes_before = {"tokenizer.json": "tokenizer.model", "model.safetensors.index.json": "model.safetensors"}
    if name in goes_before:
        (model / goes_before[name]).unlink()
    (model / name).unlink(missing_ok=True)
    os.symlink(name, model / name)
    assert_refused(healthy_memory, model, 0, f"{name}: ", "Too many levels of symbolic links", command=command)


def test_folder_that_is_a_link_to_itself(healthy_memory, tmp_path):
    os.symlink("loop", tmp_path / "loop")
    for command in ["generate", "tokenize"]:
        assert_refused(healthy_memory, tmp_path / "loop", 0, "Too many levels of symbolic links", command=command)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folder_that_may_not_be_read(healthy_memory, model):
    model.chmod(0)
    assert_refused(healthy_memory, model, 0, "Permission denied")
    model.chmod(0o700)
