"""`--weights direct` reads past the memory of the system, `--mlock` keeps weights in memory: the same tokens."""

import ctypes
import mmap
import os
import resource
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import mixtral as python_mixtral
from binary import BINARY, DEMO, ROOT, environment, mixtral, ok

IDS = torch.randint(3, 4096, (2, 30), generator=torch.Generator().manual_seed(1))
PROMPT = ["-p", "Once upon a time", "-n", "12"]
MIB = 1 << 20


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_folders_that_are_converted_while_they_are_read(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the disk of the checkout can be read directly
        direct = python_mixtral.Mixtral.from_pretrained(DEMO, dtype=dtype, weights="direct")
    read = python_mixtral.Mixtral.from_pretrained(DEMO, dtype=dtype)
    for name, weight in read.named_parameters().items():
        assert torch.equal(direct.named_parameters()[name], weight), name
    assert torch.equal(direct(IDS), read(IDS))


def test_layers_cut_over_ranks():
    expected = ok("generate", DEMO, *PROMPT)
    assert ok("generate", DEMO, *PROMPT, "--weights", "direct", "--tp", "2", "--pp", "2") == expected


def test_a_weight_that_is_not_finite_is_found(tmp_path):
    ok("generate", DEMO, *PROMPT, "--weights", "direct", "--check-weights")
    from safetensors.torch import load_file, save_file

    for file in DEMO.glob("*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = next(tmp_path.glob("*.safetensors"))
    tensors = load_file(shard)
    name = next(name for name, tensor in tensors.items() if "experts" in name and tensor.dim() == 2)
    tensors[name][3, 5] = float("nan")
    save_file(tensors, shard)
    run = mixtral("generate", tmp_path, *PROMPT, "--weights", "direct", "--check-weights")
    assert run.returncode == 3 and b"holds NaN in row 3, column 5" in run.stderr


def in_own_mounts(script: str) -> subprocess.CompletedProcess:
    """Mounts that end with the command."""
    return subprocess.run(["unshare", "-m", "sh", "-ec", script], capture_output=True, env=environment(), timeout=120)


def test_a_file_system_without_direct_reads_is_told(tmp_path):
    mount = f"mount -t ramfs none {shlex.quote(str(tmp_path))}"
    try:
        probe = in_own_mounts(mount)
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if probe.returncode != 0:
        pytest.skip(f"no file system can be mounted: {probe.stderr.decode().strip()}")
    copy = f"cp -r {shlex.quote(str(DEMO))} {shlex.quote(str(tmp_path / 'model'))}"
    command = shlex.join([str(BINARY), "generate", str(tmp_path / "model"), *PROMPT, "--weights", "direct"])
    run = in_own_mounts(f"{mount}; {copy}; exec {command}")
    assert run.returncode == 0 and run.stdout == ok("generate", DEMO, *PROMPT)
    message = run.stderr.decode()
    assert message.count("\n") == 1
    assert "weights direct" in message and "(O_DIRECT); the weights are read as with weights read" in message


# ---- locked weights --------------------------------------------------------------------------------------------------


def locked_bytes() -> int:
    return 1024 * int(next(line.split()[1] for line in Path("/proc/self/status").open() if line.startswith("VmLck")))


def without_permission(limit: int) -> None:
    """For ``preexec_fn``: as a user who may lock so many bytes. Root could lock all without this."""
    pr_capbset_drop, cap_ipc_lock = 24, 14
    ctypes.CDLL(None).prctl(pr_capbset_drop, cap_ipc_lock)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))


@pytest.mark.parametrize("weights", ["read", "direct", "mmap"])
def test_too_low_a_limit_is_an_error_with_both_numbers(weights, tmp_path):
    ok("quantize", DEMO, tmp_path / "model", "--dtype", "float32")
    flags = ["--weights", weights, "--mlock"]
    run = mixtral("generate", tmp_path / "model", *PROMPT, *flags, preexec_fn=lambda: without_permission(MIB))
    message = run.stderr.decode()
    assert run.returncode == 4 and run.stdout == b"" and message.count("\n") == 1, message
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    said = float(message.split("mlock: ")[1].split(" MiB of weights")[0])
    assert said * MIB == pytest.approx(size, rel=0.02)
    assert "RLIMIT_MEMLOCK (`ulimit -l`) of this process is 1.00 MiB" in message


def test_python_raises_memory_error():
    program = (
        "import mixtral, sys\n"
        "try:\n    mixtral.Mixtral.from_pretrained(sys.argv[1], mlock=True)\n"
        "except MemoryError as error:\n    print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, DEMO],
        env=environment(PYTHONPATH=str(ROOT / "python")),
        stdout=subprocess.PIPE,
        check=True,
        preexec_fn=lambda: without_permission(MIB),
    )
    assert run.stdout.startswith(b"mlock: ") and b"RLIMIT_MEMLOCK" in run.stdout


@pytest.fixture
def may_lock() -> None:
    """Skips where this user may not lock the bundled model."""
    size = 64 * MIB
    with mmap.mmap(-1, size) as memory:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size)) != 0:
            pytest.skip(f"64 MiB cannot be locked: {os.strerror(ctypes.get_errno())}")


@pytest.mark.parametrize("ranks", [[], ["--tp", "2"]], ids=["one", "tp2"])
@pytest.mark.parametrize("weights", ["read", "direct", "mmap"])
def test_locked_weights_give_the_same_tokens(weights, ranks, may_lock, tmp_path):
    ok("quantize", DEMO, tmp_path / "model", "--dtype", "float32")
    expected = ok("generate", DEMO, "--dtype", "float32", *PROMPT)
    run = mixtral("generate", tmp_path / "model", *PROMPT, "--weights", weights, "--mlock", *ranks)
    assert run.returncode == 0 and run.stdout == expected, run.stderr


def test_locked_weights_are_those_of_the_model(may_lock):
    before = locked_bytes()
    model = python_mixtral.Mixtral.from_pretrained(DEMO, mlock=True)
    size = sum(weight.nbytes for weight in model.named_parameters().values())
    assert size <= locked_bytes() - before <= 1.1 * size + MIB
    assert torch.equal(model(IDS), python_mixtral.Mixtral.from_pretrained(DEMO)(IDS))
