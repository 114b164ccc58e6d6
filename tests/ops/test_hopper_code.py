"""The machine code of the Hopper kernels, read without a GPU: tensor cores and TMA where meant, no local memory."""

import re
import subprocess

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
# Kernels that start while the one before them ends (csrc/ops/cuda/kernel.cuh).
START_BEHIND = [
    "rms_norm_row_kernel",
    "moe_route_kernel",
    "moe_permute_chunk_kernel",
    "moe_unpermute_token_kernel",
    "rolling_kv_cache_write_row_kernel",
    "rolling_kv_cache_rope_write_token_kernel",
    "attention_decode_kernel",
]
GLOBAL_MEMORY = {"LDG", "STG", "LD", "ST", "LDGSTS", "ATOM", "ATOMG", "RED", "REDG", "UBLKCP", "UTMALDG"}


class Code:
    """The instructions of a kernel in the order of memory: whole lines, and their names alone."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.names: list[str] = []

    def count(self, name: str) -> int:
        return self.names.count(name)


@pytest.fixture(scope="module")
def kernels() -> dict[str, Code]:
    """Every kernel for 9.0a."""
    tool = cuobjdump()
    if tool is None or b"sm_90a" not in LIBRARY.read_bytes():
        pytest.skip("no CUDA kernels for 9.0a in the library, or no cuobjdump")
    text = subprocess.run([tool, "-sass", "-arch", "sm_90a", LIBRARY], capture_output=True, text=True, check=True)
    found: dict[str, Code] = {}
    for line in text.stdout.splitlines():
        if function := re.search(r"Function : (\S+)", line):
            kernel = found.setdefault(function[1], Code())
        elif instruction := re.search(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?(([A-Z0-9]+)[^;]*);", line):
            kernel.lines.append(instruction[1])
            kernel.names.append(instruction[2])
    return found


def named(kernels: dict[str, Code], *parts: str) -> dict[str, Code]:
    found = {kernel: code for kernel, code in kernels.items() if all(part in kernel for part in parts)}
    assert found
    return found


@pytest.mark.parametrize("name", START_BEHIND)
def test_kernel_waits_for_the_one_before_then_lets_the_next_start_then_uses_memory(name, kernels):
    for kernel, code in named(kernels, name).items():
        wait, start = code.names.index("ACQBULK"), code.names.index("PREEXIT")
        assert wait < start < min(code.names.index(x) for x in GLOBAL_MEMORY & set(code.names)), kernel
        constant = [line for line in code.lines if line.startswith("LDG") and "CONSTANT" in line]
        assert not constant, f"{kernel} reads through the cache of constant data"


def test_prefill_attention_loads_soon_and_without_long_divisions(kernels):
    (code,) = named(kernels, "attention_prefill_hopper_kernel").values()
    loader = next(i for i, line in enumerate(code.lines) if line.startswith("USETMAXREG.DEALLOC"))
    names = code.names[loader:]
    first_copy = names.index("UTMALDG")
    assert first_copy < 400
    assert names[:first_copy].count("UTMACCTL") == 3, "maps of q, k and v are fetched first"
    assert "CALL" not in names, "a call: 64-bit divisions are functions"


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_has_the_instructions_it_was_written_for(name, kernels):
    for kernel, code in named(kernels, name).items():
        for wanted in KERNELS[name]:
            assert any(code.count(instruction) for instruction in wanted), f"{kernel}: none of {wanted}"
        assert code.count("STL") == code.count("LDL") == 0, f"{kernel} uses local memory"


@pytest.mark.parametrize("name", ["grouped_gemm_tile_kernel", "grouped_gemm_stream_kernel"])
def test_swiglu_rounds_values_in_pairs(name, kernels):
    """For two values of out the gates, the ups and the products take a packed conversion each; without SwiGLU, which
    has twice as many columns, the four sums take two."""
    for kernel, code in named(kernels, name, "Lb1E").items():
        plain = kernels[kernel.replace("Lb1E", "Lb0E")]
        assert code.count("F2F") == 0, kernel
        assert code.count("F2FP") * 2 == plain.count("F2FP") * 3 > 0, kernel


def test_streaming_loads_soon_and_divides_in_32_bits(kernels):
    for kernel, code in named(kernels, "grouped_gemm_stream_kernel").items():
        first = min(code.names.index(load) for load in ("UTMALDG", "UBLKCP") if load in code.names)
        assert first < (370 if "Int4" in kernel else 310), f"{kernel}: {first} instructions before the first load"
        assert "UTMACCTL" in code.names[:first], f"{kernel} prefetches no tensor map"
        assert "CALL" not in code.names, f"{kernel} calls a function, as for a 64-bit division"


def test_int4_weights_are_unpacked_while_products_run(kernels):
    """Into registers that these do not read: a tile of 64 rows and 64 depths is 16 pairs of values a thread."""
    for kernel, code in named(kernels, "grouped_gemm_stream_kernel", "Int4Weights").items():
        products = [at for at, name in enumerate(code.names) if name == "HGMMA"]
        waits = [at for at, line in enumerate(code.lines) if "WARPGROUP.DEPBAR" in line]
        assert len(products) == 4 * len(waits) > 0, kernel
        for i, wait in enumerate(waits):
            own = products[4 * i : 4 * i + 4]
            assert own[-1] < wait and code.names[own[-1] : wait].count("HMUL2") == 16, kernel
            firsts = [int(re.match(r"\S+ R\d+, R(\d+), gdesc", code.lines[at])[1]) for at in own]
            read = {first + r for first in firsts for r in range(4)}
            found = (re.match(r"\S+ R(\d+)", line) for line in code.lines[own[-1] + 1 : wait])
            written = {int(match[1]) for match in found if match}
            assert len(read) == 16 and not read & written, kernel


def test_fp8_products_start_from_zero_and_free_their_stage_before_the_additions(kernels):
    for kernel, code in named(kernels, "grouped_gemm_stream_kernel", "E4m3Weights").items():
        products = [line for line in code.lines if "QGMMA" in line]
        assert sum("RZ, !UPT" in line for line in products) * 4 == len(products), kernel
        waits = [at for at, line in enumerate(code.lines) if "WARPGROUP.DEPBAR" in line]
        assert len(waits) * 4 == len(products), kernel
        for at in waits:
            behind = next(line for line in code.lines[at:] if "SYNCS.ARRIVE" in line or "FADD" in line)
            assert "SYNCS.ARRIVE" in behind, kernel
