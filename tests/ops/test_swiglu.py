"""swiglu against the f64 reference, its invariances and its errors."""

import pytest
import torch

import mixtral.ops as ops
from conftest import assert_within_tolerance, opcheck, with_threads

SHAPES = [(0, 8), (3, 0), (1, 2), (3, 10), (2, 32), (7, 34), (33, 514), (2, 28672)]


@pytest.mark.every_isa
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, device, dtype):
    gate_up = (4 * torch.randn(shape, device=device, dtype=torch.float64)).to(dtype)
    assert_within_tolerance("swiglu", ops.swiglu(gate_up), gate_up)


@pytest.mark.every_isa
def test_extreme_gates(device, dtype):
    gate = torch.tensor([0.0, 100, -100, 1e4, -1e4, float("nan")], device=device, dtype=dtype)
    out = ops.swiglu(torch.cat([gate, torch.ones_like(gate)])[None])[0]
    assert out[5].isnan()
    assert torch.equal(out[:5], torch.tensor([0, 100, 0, 1e4, 0], device=device, dtype=dtype))


def test_strided_inputs(device, dtype):
    wide = torch.randn(6, 2 * 40 + 1, device=device).to(dtype)
    for gate_up in (wide[:, 1::2], wide[:4].T, wide[:1, :40].expand(3, -1), wide[:, 1:]):
        assert torch.equal(ops.swiglu(gate_up), ops.swiglu(gate_up.contiguous()))


@pytest.mark.every_isa
def test_row_does_not_depend_on_batch_or_threads(device, dtype):
    gate_up = torch.randn(129, 2 * 1000, device=device).to(dtype)
    whole = with_threads(2, lambda: ops.swiglu(gate_up))
    assert torch.equal(whole, with_threads(1, lambda: ops.swiglu(gate_up)))
    for m in (0, 64, 128):
        assert torch.equal(whole[m : m + 1], ops.swiglu(gate_up[m : m + 1]))


@pytest.mark.parametrize(
    ("gate_up", "message"),
    [
        (torch.ones(4), r"swiglu: gate_up must have 2 dimensions \[M, 2I\], got shape \[4\]"),
        (torch.ones(2, 3), r"swiglu: gate_up must have an even size in dimension 1, got shape \[2, 3\]"),
        (torch.ones(2, 4).double(), "swiglu: gate_up must be Float, BFloat16 or Half, got Double"),
    ],
)
def test_bad_input_raises(gate_up, message, device):
    with pytest.raises(RuntimeError, match=message):
        ops.swiglu(gate_up.to(device))


@pytest.mark.parametrize("shape", [(0, 8), (3, 10), (4, 64)], ids=str)
def test_opcheck(shape, device, dtype):
    opcheck(torch.ops.mixtral.swiglu.default, (torch.randn(shape, device=device).to(dtype),))
