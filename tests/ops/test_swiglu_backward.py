"""Gradient of swiglu: closed form, tolerance, extreme gates, invariances, and the ways of autograd."""

import pytest
import torch

from conftest import assert_within_tolerance, opcheck, share_of_tolerance
from error_bounds import swiglu_backward_bound
from gradients import (
    RANDOM_CASE_DTYPES,
    assert_compiles,
    assert_only_wanted_gradients,
    assert_random_cases,
    assert_same_with_one_and_two_threads,
    gradcheck_reference,
    normal,
    second_derivative,
    size,
)
from mixtral import reference

SHAPES = [(0, 4), (3, 0), (1, 1), (3, 5), (2, 16), (33, 257), (2, 14336)]
swiglu_backward = torch.ops.mixtral.swiglu_backward.default


def make(shape: tuple[int, int], device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """grad, gate_up."""
    rows, intermediate = shape
    grad, gate_up = normal(rows, intermediate, dtype=dtype), 4 * normal(rows, 2 * intermediate, dtype=dtype)
    return grad.to(device), gate_up.to(device)


def test_closed_form_is_the_derivative():
    gradcheck_reference(reference.swiglu, reference.swiglu_backward, make((3, 4), "cpu", torch.float64)[1])


@pytest.mark.every_isa
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, device, dtype):
    arguments = make(shape, device, dtype)
    assert_within_tolerance("swiglu_backward", swiglu_backward(*arguments), *arguments)


@pytest.mark.parametrize("dtype", RANDOM_CASE_DTYPES, ids=str)
def test_random_cases(device, dtype):
    def make_arguments(dtype):
        return (size(8) * normal(size(40), 2 * size(200), dtype=dtype),)

    assert_random_cases(
        "swiglu", make_arguments, device, dtype, lambda *arguments: (swiglu_backward_bound(*arguments),)
    )


@pytest.mark.every_isa
def test_faults_are_caught(dtype):
    grad, gate_up = make((33, 257), "cpu", dtype)
    gate, up = gate_up.double().chunk(2, -1)
    right = swiglu_backward(grad, gate_up)
    for wrong in (
        torch.cat(((grad.double() * up * gate.sigmoid()).to(dtype), right[:, 257:]), -1),  # without the slope
        torch.cat(((1.01 * right[:, :257].double()).to(dtype), right[:, 257:]), -1),
        swiglu_backward(grad, 1.01 * gate_up),
    ):
        assert share_of_tolerance("swiglu_backward", wrong, grad, gate_up) > 1


@pytest.mark.every_isa
def test_extreme_gates(device, dtype):
    gate = torch.tensor([0.0, 100, -100, 1e4, -1e4, float("nan")], device=device, dtype=dtype)
    ones = torch.ones_like(gate)
    gradient = swiglu_backward(ones[None], torch.cat([gate, 2 * ones])[None])[0]
    assert gradient[[5, 11]].isnan().all()
    assert torch.equal(gradient[:5], torch.tensor([1, 2, 0, 2, 0], device=device, dtype=dtype))
    assert torch.equal(gradient[6:11], torch.tensor([0, 100, 0, 1e4, 0], device=device, dtype=dtype))


def test_strided_and_expanded_inputs(device, dtype):
    wide = normal(6, 2 * 40 + 1, dtype=dtype).to(device)
    gate_up, grad = wide[:, 1::2], wide[0, :20].expand(6, -1)
    expected = swiglu_backward(grad.contiguous(), gate_up.contiguous())
    assert torch.equal(swiglu_backward(grad, gate_up), expected)


@pytest.mark.every_isa
def test_row_does_not_depend_on_batch_or_threads(device, dtype):
    grad, gate_up = make((129, 1000), device, dtype)
    assert_same_with_one_and_two_threads("swiglu", (gate_up,))
    whole = swiglu_backward(grad, gate_up)
    for m in (0, 64, 128):
        assert torch.equal(whole[m : m + 1], swiglu_backward(grad[m : m + 1], gate_up[m : m + 1]))


@pytest.mark.parametrize(
    ("grad", "gate_up", "message"),
    [
        (torch.ones(2, 2), torch.ones(2, 3), r"gate_up must have an even size in dimension 1, got shape \[2, 3\]"),
        (torch.ones(2, 3), torch.ones(2, 4), r"grad must have size 2 in dimension 1, got shape \[2, 3\]"),
        (torch.ones(3, 2), torch.ones(2, 4), r"grad must have size 2 in dimension 0, got shape \[3, 2\]"),
        (torch.ones(2), torch.ones(2, 4), r"grad must have 2 dimensions \[M, I\], got shape \[2\]"),
        (torch.ones(2, 2).half(), torch.ones(2, 4), "grad must be Float, got Half"),
    ],
)
def test_bad_input_raises(grad, gate_up, message, device):
    with pytest.raises(RuntimeError, match="swiglu_backward: " + message):
        swiglu_backward(grad.to(device), gate_up.to(device))


def test_ways_of_autograd(device, dtype):
    _, gate_up = make((4, 6), device, dtype)
    assert_only_wanted_gradients("swiglu", (gate_up,))
    assert_compiles("swiglu", (gate_up,))
    with pytest.raises(RuntimeError, match="swiglu_backward: gradients of gradients are not supported"):
        second_derivative("swiglu", (gate_up,))


@pytest.mark.parametrize("shape", [(0, 8), (3, 5), (4, 32)], ids=str)
def test_opcheck(shape, device, dtype):
    grad, gate_up = make(shape, device, dtype)
    opcheck(swiglu_backward, (grad, gate_up))
    opcheck(torch.ops.mixtral.swiglu.default, (gate_up.requires_grad_(),))
