"""Every instruction set that the processor has: the tests marked ``every_isa``, the order of sums, and the choice."""

import functools
import json

import pytest
import torch

from isa import ISAS, available_isas, run_under_isa

RUN_MARKED_TESTS = """
import pytest, sys
sys.exit(pytest.main(["tests/ops", "-m", "every_isa", "-q", "-p", "no:cacheprovider"]))
"""
# The bits of some products. In the first, every order of summation gives other bits: terms of all magnitudes cancel.
MULTIPLY = """
import json, torch, mixtral.ops as ops
from test_every_isa import cancelling_rows
bf16 = ops.grouped_gemm(cancelling_rows(), torch.ones(1, 32, 1280).bfloat16(), torch.tensor([40]))
torch.manual_seed(0)
a, b, offs = torch.randn(5, 640), torch.randn(1, 40, 640), torch.tensor([5])
f32, f16 = ops.grouped_gemm(a, b, offs), ops.grouped_gemm(a.half(), b.half(), offs)
print(json.dumps({"bf16": bf16[:, 0].tolist(), "f32": f32.tolist(), "f16": f16.tolist()}))
"""


def cancelling_rows() -> torch.Tensor:
    """bf16 [40, 1280]."""
    torch.manual_seed(0)
    half = (torch.randn(40, 640) * 2.0 ** torch.randint(0, 24, (40, 640))).bfloat16()
    return torch.cat((half, -half.flip(1)), 1)


@functools.cache
def products(isa: str) -> dict[str, list]:
    result = run_under_isa(isa, MULTIPLY)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def chain(terms: torch.Tensor) -> torch.Tensor:
    """f32 [M, K] -> [M]: one after the other."""
    total = torch.zeros(len(terms))
    for term in terms.T:
        total = total + term
    return total


def sums_by_definition(isa: str, terms: torch.Tensor) -> torch.Tensor:
    """f32 [M, K] -> [M] in the order that docs/numerics.md gives for products of bf16."""
    if isa == "amx":
        steps = [chain(step[:, ::2]) + chain(step[:, 1::2]) for step in terms.split(32, 1)]
    else:
        if isa == "avx512_bf16":
            terms = terms.unflatten(1, (-1, 2)).flip(2).flatten(1)
        steps = [chain(part) for part in terms.split(256, 1)]
    return chain(torch.stack(steps, 1))


@pytest.mark.parametrize("isa", ISAS)
def test_marked_tests_pass(isa):
    if isa not in available_isas():
        result = run_under_isa(isa, MULTIPLY)
        assert result.returncode != 0
        assert f"MIXTRAL_CPU_ISA: must be one that this processor has, up to {available_isas()[-1]}" in result.stderr
        return
    result = run_under_isa(isa, RUN_MARKED_TESTS)
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout and " skipped" not in result.stdout


def test_order_of_sums():
    for isa in available_isas():
        expected = sums_by_definition(isa, cancelling_rows().float()).bfloat16()
        assert products(isa)["bf16"] == expected.tolist(), isa


def test_f16_has_the_same_bits_everywhere_and_f32_from_avx2_on():
    assert len({str(products(isa)["f16"]) for isa in available_isas()}) == 1
    assert len({str(products(isa)["f32"]) for isa in available_isas() if isa != "baseline"}) <= 1


@pytest.mark.parametrize(("name", "fits"), [("", True), ("sse9", False), ("AMX", False)])
def test_bad_name_is_an_error_in_words(name, fits):
    result = run_under_isa(name, MULTIPLY)
    message = f"RuntimeError: MIXTRAL_CPU_ISA: must be baseline, avx2, avx512, avx512_bf16 or amx, got {name}"
    assert (result.returncode == 0) == fits and (message in result.stderr) != fits
