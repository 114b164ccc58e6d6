"""The list of tensor maps that tests/cuda/tensor_maps.cu asks the driver for; what it answers, only a GPU can tell."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).resolve().parents[2] / "build" / "bin" / "mixtral_tensor_maps"
pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="the target mixtral_tensor_maps is not built")


def run() -> subprocess.CompletedProcess:
    return subprocess.run([PROGRAM], capture_output=True, text=True, timeout=60)


def maps() -> list[tuple[str, list[int], list[int], list[int]]]:
    """Kind, sizes, strides and box of each map, innermost dimension first."""
    found = []
    for line in run().stdout.splitlines():
        if match := re.fullmatch(r"(?:made|refused, CUresult \d+): (.*); sizes (.*); strides (.*); box (.*)", line):
            kind, *numbers = match.groups()
            found.append((kind, *([int(n) for n in text.split()] for text in numbers)))
    return found


def test_every_kind_is_asked_for():
    made = maps()
    fp8 = {(strides[0], strides[1]) for kind, _, strides, _ in made if "fp8 weights" in kind}
    assert fp8 == {(k, 32 * k + 128) for k in (4096, 14336)}
    assert {box[1] for kind, *_, box in made if "bf16 tokens" in kind} == {8, 16, 32, 64, 128, 256}
    assert {box[1] for kind, *_, box in made if "fp8 tokens" in kind} == {8, 16, 32, 64, 128}
    pages = {sizes[2]: box[2] for kind, sizes, _, box in made if "in pages of" in kind}
    assert pages == {8: 8, 16: 16, 32: 32, 64: 64, 128: 128, 256: 128}
    for kind in ("prefill queries", "prefill packed keys", "tile a and b, gate and up", "tile a and b, down"):
        assert any(name.startswith(kind) for name, *_ in made), kind


def test_every_map_keeps_to_the_rules_that_the_driver_documents():
    for kind, sizes, strides, box in maps():
        bytes_of_value = 1 if "fp8" in kind else 2
        assert len(sizes) == len(box) == len(strides) + 1, kind
        assert box[0] * bytes_of_value <= 128, kind  # the swizzle
        assert all(0 < edge <= 256 for edge in box) and all(0 < size <= 2**32 for size in sizes), kind
        assert all(stride % 16 == 0 and stride < 2**40 for stride in strides), kind


def test_the_driver_makes_all_of_them_or_says_which_not():
    done = run()
    refused = [line for line in done.stdout.splitlines() if line.startswith("refused")]
    assert done.returncode == (1 if refused else 0)
    assert done.stdout.splitlines()[-1].startswith(f"{len(refused)} of ")
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        assert not refused, "\n".join(refused)
