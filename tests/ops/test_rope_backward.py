"""Gradients of rope: closed form, tolerance, invariances, and the ways of autograd."""

import pytest
import torch

import mixtral.ops as ops
from conftest import assert_within_tolerance, opcheck
from error_bounds import rope_bound
from gradients import (
    RANDOM_CASE_DTYPES,
    assert_compiles,
    assert_only_wanted_gradients,
    assert_random_cases,
    assert_same_with_one_and_two_threads,
    gradcheck_reference,
    gradients,
    normal,
    second_derivative,
    size,
)
from mixtral import reference

SHAPES = [(0, 2, 1, 8), (1, 1, 1, 2), (3, 4, 2, 6), (5, 8, 2, 128), (33, 3, 5, 80), (4, 3, 0, 16)]
THETA = 1e6
rope_backward = torch.ops.mixtral.rope_backward.default


def make(
    shape: tuple[int, int, int, int], device: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad_q, or q, grad_k, or k, and positions."""
    tokens, heads, kv_heads, head_dim = shape
    q, k = (normal(tokens, n, head_dim, dtype=dtype).to(device) for n in (heads, kv_heads))
    return q, k, torch.randint(0, 40000, (tokens,), device=device)


@pytest.mark.parametrize("interleaved", [False, True])
def test_closed_form_is_the_derivative(interleaved):
    q, k, positions = make((3, 2, 1, 6), "cpu", torch.float64)
    rest = (positions, THETA, interleaved)
    gradcheck_reference(
        lambda q, k: reference.rope(q, k, *rest),
        lambda grad_q, grad_k, q, k: reference.rope_backward(grad_q, grad_k, *rest),
        q,
        k,
    )


@pytest.mark.every_isa
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, interleaved, device, dtype):
    arguments = (*make(shape, device, dtype), THETA, interleaved)
    assert_within_tolerance("rope_backward", rope_backward(*arguments), *arguments)


@pytest.mark.parametrize("dtype", RANDOM_CASE_DTYPES, ids=str)
def test_random_cases(device, dtype):
    def make_arguments(dtype):
        shape = (size(40), size(8), size(4), 2 * size(64))
        return *make(shape, "cpu", dtype), (1e4, THETA)[size(2) - 1], size(2) == 2

    def bounds(grad_q, grad_k, q, k, *rest):
        return rope_bound(grad_q, grad_k, *rest)

    assert_random_cases("rope", make_arguments, device, dtype, bounds)


@pytest.mark.every_isa
@pytest.mark.parametrize("interleaved", [False, True])
def test_is_the_rotation_by_the_negative_position_bit_for_bit(interleaved, device, dtype):
    grad_q, grad_k, positions = make((9, 4, 2, 64), device, dtype)
    positions[0] = 2**33 + 1
    back = ops.rope(grad_q, grad_k, -positions, THETA, interleaved)
    for actual, expected in zip(rope_backward(grad_q, grad_k, positions, THETA, interleaved), back, strict=True):
        assert torch.equal(actual, expected)


def test_strided_and_expanded_inputs(device, dtype):
    packed = normal(6, 4 + 2, 32, dtype=dtype).to(device)
    grad_q, grad_k, positions = packed[:, :4], packed[:1, 4:6].expand(6, -1, -1), torch.arange(12, device=device)[::2]
    expected = rope_backward(grad_q.contiguous(), grad_k.contiguous(), positions.contiguous(), THETA)
    for actual, want in zip(rope_backward(grad_q, grad_k, positions, THETA), expected, strict=True):
        assert torch.equal(actual, want)


@pytest.mark.every_isa
def test_token_does_not_depend_on_batch_or_threads(device, dtype):
    q, k, positions = make((129, 8, 2, 128), device, dtype)
    assert_same_with_one_and_two_threads("rope", (q, k, positions, THETA))
    whole = rope_backward(q, k, positions, THETA)[0]
    assert torch.equal(whole[64:65], rope_backward(q[64:65], k[64:65], positions[64:65], THETA)[0])


def test_results_that_are_not_used(device, dtype):
    q, k, positions = make((5, 4, 2, 16), device, dtype)
    arguments, grads = (q, k, positions, THETA), (q, k)
    full = gradients(ops.rope, arguments, grads)
    only_q, only_k = (gradients(ops.rope, arguments, some) for some in ((q, None), (None, k)))
    assert torch.equal(only_q[0], full[0]) and only_q[1] is None
    assert torch.equal(only_k[1], full[1]) and only_k[0] is None
    assert gradients(ops.rope, arguments, (None, k), wanted=(0,)) == [None, None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_q": torch.ones(3, 8)}, r"grad_q must have 3 dimensions \[T, Nq, D\], got shape \[3, 8\]"),
        ({"grad_q": torch.ones(3, 2, 8).double()}, "grad_q must be Float, BFloat16 or Half, got Double"),
        ({"grad_k": torch.ones(2, 1, 8)}, r"grad_k must have size 3 in dimension 0, got shape \[2, 1, 8\]"),
        ({"positions": torch.ones(3)}, "positions must be Int or Long, got Float"),
        ({"theta": 0.0}, "theta must be positive and finite, got 0"),
    ],
)
def test_bad_input_raises(change, message, device):
    arguments = {
        "grad_q": torch.ones(3, 2, 8),
        "grad_k": torch.ones(3, 1, 8),
        "positions": torch.arange(3),
        "theta": THETA,
    } | change
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with pytest.raises(RuntimeError, match="rope_backward: " + message):
        rope_backward(**moved)


def test_ways_of_autograd(device, dtype):
    arguments = (*make((4, 3, 1, 6), device, dtype), THETA)
    assert_only_wanted_gradients("rope", arguments)
    assert_compiles("rope", arguments)
    with pytest.raises(RuntimeError, match="rope_backward: gradients of gradients are not supported"):
        second_derivative("rope", arguments)


@pytest.mark.parametrize("shape", [(0, 2, 1, 8), (3, 4, 2, 6), (3, 4, 0, 6)], ids=str)
def test_opcheck(shape, device, dtype):
    q, k, positions = make(shape, device, dtype)
    opcheck(rope_backward, (q, k, positions, THETA), {"interleaved": True})
    opcheck(torch.ops.mixtral.rope.default, (q.requires_grad_(), k.requires_grad_(), positions, THETA))
