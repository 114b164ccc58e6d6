"""rms_norm and add_rms_norm against the f64 reference, their invariances and their errors."""

import pytest
import torch

import mixtral.ops as ops
from conftest import assert_within_tolerance, opcheck, with_threads

SHAPES = [(0, 8), (1, 1), (3, 5), (2, 16), (7, 100), (33, 257), (5, 4096)]
EPS = 1e-5


def make(shape: tuple[int, int], device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, residual = torch.randn(2, *shape, device=device, dtype=torch.float64).to(dtype)
    return x, residual, torch.randn(shape[1], device=device, dtype=torch.float64).to(dtype)


@pytest.mark.every_isa
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_matches_reference(shape, device, dtype):
    x, _, weight = make(shape, device, dtype)
    assert_within_tolerance("rms_norm", ops.rms_norm(x, weight, EPS), x, weight, EPS)


@pytest.mark.every_isa
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm_matches_reference(shape, device, dtype):
    x, residual, weight = make(shape, device, dtype)
    normed, total = ops.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert_within_tolerance("rms_norm", normed, total, weight, EPS)


def test_strided_and_offset_inputs(device, dtype):
    wide = torch.randn(6, 2 * 40 + 1, device=device).to(dtype)
    x, residual, weight = wide[:, 1::2], wide[:, 0:80:2], wide[0, :40]
    assert not x.is_contiguous()
    expected = ops.add_rms_norm(x.contiguous(), residual.contiguous(), weight.contiguous(), EPS)
    for actual, want in zip(ops.add_rms_norm(x, residual, weight, EPS), expected, strict=True):
        assert torch.equal(actual, want)
    row = wide[:1, :40]
    assert torch.equal(ops.rms_norm(row.expand(3, -1), weight, EPS)[2], ops.rms_norm(row, weight, EPS)[0])


def test_row_does_not_depend_on_batch_or_threads(device, dtype):
    x, residual, weight = make((129, 4096), device, dtype)
    whole = with_threads(2, lambda: ops.add_rms_norm(x, residual, weight, EPS)[0])
    assert torch.equal(whole, with_threads(1, lambda: ops.add_rms_norm(x, residual, weight, EPS)[0]))
    for t in (0, 64, 128):
        assert torch.equal(whole[t : t + 1], ops.add_rms_norm(x[t : t + 1], residual[t : t + 1], weight, EPS)[0])


def test_nan_stays_in_its_row(device, dtype):
    x, _, weight = make((3, 64), device, dtype)
    clean = ops.rms_norm(x, weight, EPS)
    x[1, 5] = float("nan")
    out = ops.rms_norm(x, weight, EPS)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize(
    ("x", "weight", "eps", "message"),
    [
        (
            torch.ones(2, 3, 4),
            torch.ones(4),
            EPS,
            r"rms_norm: x must have 2 dimensions \[T, H\], got shape \[2, 3, 4\]",
        ),
        (torch.ones(2, 4), torch.ones(3), EPS, r"rms_norm: weight must have size 4 in dimension 0, got shape \[3\]"),
        (torch.ones(2, 4), torch.ones(4, 1), EPS, r"rms_norm: weight must have 1 dimensions \[H\], got shape \[4, 1\]"),
        (torch.ones(2, 4), torch.ones(4).half(), EPS, "rms_norm: weight must be Float, got Half"),
        (
            torch.ones(2, 4).double(),
            torch.ones(4).double(),
            EPS,
            "rms_norm: x must be Float, BFloat16 or Half, got Double",
        ),
        (torch.ones(2, 4), torch.ones(4), -1.0, "rms_norm: eps must be >= 0, got -1"),
    ],
)
def test_bad_input_raises(x, weight, eps, message, device):
    with pytest.raises(RuntimeError, match=message):
        ops.rms_norm(x.to(device), weight.to(device), eps)


def test_bad_residual_raises(device):
    x, weight = torch.ones(2, 4, device=device), torch.ones(4, device=device)
    with pytest.raises(RuntimeError, match="add_rms_norm: residual must have size 2 in dimension 0"):
        ops.add_rms_norm(x, torch.ones(3, 4, device=device), weight, EPS)
    with pytest.raises(RuntimeError, match="add_rms_norm: residual must be Float, got BFloat16"):
        ops.add_rms_norm(x, x.bfloat16(), weight, EPS)


@pytest.mark.parametrize("shape", [(0, 8), (3, 5), (4, 64)], ids=str)
def test_opcheck(shape, device, dtype):
    x, residual, weight = make(shape, device, dtype)
    opcheck(torch.ops.mixtral.rms_norm.default, (x, weight, EPS))
    opcheck(torch.ops.mixtral.add_rms_norm.default, (x, residual, weight, EPS))
