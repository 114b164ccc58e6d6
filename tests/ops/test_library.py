"""The built op library: stable ABI only, and CUDA code for every listed architecture without spills."""

import re
import subprocess

import pytest

from cuda_code import cuobjdump
from mixtral.ops._library import LIBRARY


def test_no_symbol_of_torchs_unstable_abi_is_needed():
    undefined = subprocess.run(["nm", "-DuC", LIBRARY], capture_output=True, text=True, check=True).stdout
    assert "aoti_torch" in undefined or "torch_" in undefined, "nm saw no torch symbol at all"
    assert not re.findall(r"\b(?:at|c10|torch::(?:autograd|jit|Library))::\S+", undefined)


def resource_usage() -> list[tuple[str, str, int]]:
    """(architecture, kernel, bytes of local memory and stack) of every kernel; empty for a CPU-only build."""
    tool = cuobjdump()
    if tool is None:
        return []
    text = subprocess.run([tool, "--dump-resource-usage", LIBRARY], capture_output=True, text=True).stdout
    architecture, found, kernel = "", [], ""
    for line in text.splitlines():
        if match := re.match(r"arch = (\S+)", line.strip()):
            architecture = match.group(1)
        elif match := re.match(r"Function (\S+):", line.strip()):
            kernel = match.group(1)
        elif match := re.search(r"LOCAL:(\d+)", line):
            stack = int(re.search(r"STACK:(\d+)", line).group(1))
            found.append((architecture, kernel, int(match.group(1)) + stack))
    return found


USAGE = resource_usage()
# Kernels written for 9.0a alone (*_hopper.cuh).
HOPPER = re.compile("grouped_gemm_(tile|stream)_kernel|quantize_rows_kernel|attention_(prefill_hopper|decode)_kernel")


@pytest.mark.skipif(not USAGE, reason="no CUDA kernels in the library, or no cuobjdump")
def test_cuda_kernels_are_there_for_every_architecture():
    kernels: dict[str, set[str]] = {}
    for architecture, kernel, _ in USAGE:
        kernels.setdefault(architecture, set()).add(kernel)
    everywhere = set.intersection(*kernels.values())
    assert len(everywhere) >= 10
    for architecture, own in kernels.items():
        assert all(architecture == "sm_90a" and HOPPER.search(kernel) for kernel in own - everywhere), architecture


@pytest.mark.skipif(not USAGE, reason="no CUDA kernels in the library, or no cuobjdump")
def test_cuda_kernels_use_no_local_memory():
    assert not [entry for entry in USAGE if entry[2] > 0]
