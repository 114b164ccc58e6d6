"""The machine code of the Hopper kernels, read without a GPU: tensor cores and TMA where meant, no local memory."""

import re
import subprocess
from collections import Counter

import pytest

from cuda_code import cuobjdump
from mixtral.ops._library import LIBRARY

WGMMA = {"HGMMA", "QGMMA"}  # of bf16, and of 8-bit floats
# Part of a kernel's name -> instructions of which it has at least one: products, and the way of its data.
KERNELS = {
    "grouped_gemm_tile_kernel": (WGMMA, {"UTMALDG"}),
    "grouped_gemm_stream_kernel": (WGMMA, {"UTMALDG"}),
    "E4m3Weights": ({"QGMMA"}, {"UTMALDG"}),
    "quantize_rows_kernel": ({"F2FP"}, {"STG"}),
    "attention_prefill_hopper_kernel": (WGMMA, {"UTMALDG"}),
    "attention_decode": ({"HMMA"}, {"LDGSTS"}, {"LDSM"}),
}


@pytest.fixture(scope="module")
def kernels() -> dict[str, Counter]:
    """How often each instruction occurs in every kernel for 9.0a."""
    tool = cuobjdump()
    if tool is None or b"sm_90a" not in LIBRARY.read_bytes():
        pytest.skip("no CUDA kernels for 9.0a in the library, or no cuobjdump")
    code = subprocess.run([tool, "-sass", "-arch", "sm_90a", LIBRARY], capture_output=True, text=True, check=True)
    counts: dict[str, Counter] = {}
    for line in code.stdout.splitlines():
        if function := re.search(r"Function : (\S+)", line):
            kernel = counts.setdefault(function[1], Counter())
        elif instruction := re.search(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z0-9]+)", line):
            kernel[instruction[1]] += 1
    return counts


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_has_the_instructions_it_was_written_for(name, kernels):
    found = {kernel: counts for kernel, counts in kernels.items() if name in kernel}
    assert found
    for kernel, counts in found.items():
        for wanted in KERNELS[name]:
            assert any(counts[instruction] for instruction in wanted), f"{kernel}: none of {wanted}"
        assert counts["STL"] == counts["LDL"] == 0, f"{kernel} uses local memory"
