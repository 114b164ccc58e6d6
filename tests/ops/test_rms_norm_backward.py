"""Gradients of rms_norm and add_rms_norm: closed form, tolerance, invariances, and the ways of autograd."""

import pytest
import torch

import mixtral.ops as ops
from conftest import assert_within_tolerance, opcheck, share_of_tolerance
from error_bounds import add_rms_norm_backward_bound, rms_norm_backward_bound
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

SHAPES = [(0, 8), (1, 1), (3, 5), (2, 16), (33, 257), (70, 48), (5, 4096)]
EPS = 1e-5
rms_norm_backward = torch.ops.mixtral.rms_norm_backward.default
add_rms_norm_backward = torch.ops.mixtral.add_rms_norm_backward.default


def make(shape: tuple[int, int], device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """grad, grad_sum, x, weight."""
    rows = (normal(*shape, dtype=dtype).to(device) for _ in range(3))
    return *rows, normal(shape[1], dtype=dtype).to(device)


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (4, 5)], ids=str)
def test_closed_form_is_the_derivative(shape):
    _, residual, x, weight = make(shape, "cpu", torch.float64)
    gradcheck_reference(
        lambda x, weight: reference.rms_norm(x, weight, EPS),
        lambda grad, x, weight: reference.rms_norm_backward(grad, x, weight, EPS),
        x,
        weight,
    )

    def add_backward(grad_normed, grad_sum, x, residual, weight):
        grad_x, grad_weight = reference.add_rms_norm_backward(grad_normed, grad_sum, x + residual, weight, EPS)
        return grad_x, grad_x, grad_weight

    gradcheck_reference(lambda *inputs: reference.add_rms_norm(*inputs, EPS), add_backward, x, residual, weight)


@pytest.mark.every_isa
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, device, dtype):
    grad, grad_sum, x, weight = make(shape, device, dtype)
    assert_within_tolerance("rms_norm_backward", rms_norm_backward(grad, x, weight, EPS), grad, x, weight, EPS)
    for other in (grad_sum, None):
        arguments = (grad, other, x, weight, EPS)
        assert_within_tolerance("add_rms_norm_backward", add_rms_norm_backward(*arguments), *arguments)


@pytest.mark.parametrize("dtype", RANDOM_CASE_DTYPES, ids=str)
def test_random_cases_of_rms_norm(device, dtype):
    def make_arguments(dtype):
        hidden = size(300)
        return normal(size(80), hidden, dtype=dtype), normal(hidden, dtype=dtype), EPS

    assert_random_cases("rms_norm", make_arguments, device, dtype, rms_norm_backward_bound)


@pytest.mark.parametrize("dtype", RANDOM_CASE_DTYPES, ids=str)
def test_random_cases_of_add_rms_norm(device, dtype):
    def make_arguments(dtype):
        tokens, hidden = size(80), size(300)
        x, residual = (torch.randint(-31, 32, (2, tokens, hidden)) / 16).to(dtype)  # whose sums are exact
        return x, residual, normal(hidden, dtype=dtype), EPS

    def bounds(grad_normed, grad_sum, x, residual, weight, eps):
        grad_x, grad_weight = add_rms_norm_backward_bound(grad_normed, grad_sum, x + residual, weight, eps)
        return grad_x, grad_x, grad_weight

    assert_random_cases("add_rms_norm", make_arguments, device, dtype, bounds)


@pytest.mark.every_isa
@pytest.mark.parametrize("hidden", [100, 4096])
def test_faults_are_caught(hidden, dtype):
    grad, _, x, weight = make((70, hidden), "cpu", dtype)
    arguments = (grad, x, weight, EPS)
    grad_x, grad_weight = rms_norm_backward(*arguments)
    shorter = torch.cat((x[:, :-1], torch.zeros_like(x[:, -1:])), 1)
    wrong = [
        (rms_norm_backward(grad, shorter, weight, EPS)[0], grad_weight),  # without the last square and product
        (grad_x, rms_norm_backward(grad[:-1], x[:-1], weight, EPS)[1]),  # without the last token
        ((grad * weight * torch.rsqrt(x.double().square().mean(-1, keepdim=True))).to(dtype), grad_weight),  # no mean
    ]
    if dtype != torch.float32:  # the normalised value rounded to 16 bits
        normed = reference.rms_norm(x.double(), torch.ones(hidden).double(), EPS).to(dtype).double()
        wrong.append((grad_x, (grad.double() * normed).sum(0).to(dtype)))
    for results in wrong:
        assert share_of_tolerance("rms_norm_backward", results, *arguments) > 1


def test_strided_and_expanded_inputs(device, dtype):
    wide = normal(6, 2 * 40 + 1, dtype=dtype).to(device)
    x, grad, weight = wide[:, 1::2], wide[0, :40].expand(6, -1), wide[0, 1::2]
    expected = add_rms_norm_backward(grad.contiguous(), x.contiguous(), x.contiguous(), weight.contiguous(), EPS)
    for actual, want in zip(add_rms_norm_backward(grad, x, x, weight, EPS), expected, strict=True):
        assert torch.equal(actual, want)


@pytest.mark.every_isa
def test_bits_do_not_depend_on_threads(dtype):
    _, residual, x, weight = make((129, 1000), "cpu", dtype)
    assert_same_with_one_and_two_threads("rms_norm", (x, weight, EPS))
    assert_same_with_one_and_two_threads("add_rms_norm", (x, residual, weight, EPS))


@pytest.mark.every_isa
def test_order_of_the_sum_over_rows(device):
    """Row blocks of 32 rows in order: with n = 1 the gradient of the weight is the sum of the gradients in f32."""
    grad = torch.randn(100, 7, device=device) * 2.0 ** torch.randint(0, 24, (100, 7), device=device)
    total = torch.zeros(7, device=device)
    for block in grad.split(32):
        of_block = torch.zeros(7, device=device)
        for row in block:
            of_block = of_block + row
        total = total + of_block
    ones = torch.ones_like(grad)
    assert torch.equal(rms_norm_backward(grad, ones, ones[0], 0.0)[1], total)


def test_row_does_not_depend_on_batch(device, dtype):
    grad, grad_sum, x, weight = make((129, 1000), device, dtype)
    whole = add_rms_norm_backward(grad, grad_sum, x, weight, EPS)[0]
    for t in (0, 64, 128):
        rows = slice(t, t + 1)
        assert torch.equal(whole[rows], add_rms_norm_backward(grad[rows], grad_sum[rows], x[rows], weight, EPS)[0])


def test_nan_stays_in_its_row_and_column(device, dtype):
    grad, _, x, weight = make((3, 64), device, dtype)
    clean = rms_norm_backward(grad, x, weight, EPS)
    grad[1, 5] = float("nan")
    grad_x, grad_weight = rms_norm_backward(grad, x, weight, EPS)
    assert grad_x[1].isnan().all() and torch.equal(grad_x[[0, 2]], clean[0][[0, 2]])
    assert grad_weight[5].isnan() and torch.equal(grad_weight[:5], clean[1][:5])


def test_only_wanted_gradients(device, dtype):
    _, residual, x, weight = make((40, 24), device, dtype)
    assert_only_wanted_gradients("rms_norm", (x, weight, EPS))
    assert_only_wanted_gradients("add_rms_norm", (x, residual, weight, EPS))


def test_results_that_are_not_used(device, dtype):
    grad, grad_sum, x, weight = make((5, 16), device, dtype)
    arguments = (x, x, weight, EPS)
    zeros = torch.zeros_like(x)
    for grads in ((grad, None), (None, grad_sum)):
        some = gradients(ops.add_rms_norm, arguments, grads)
        full = gradients(ops.add_rms_norm, arguments, tuple(zeros if g is None else g for g in grads))
        assert torch.equal(some[0], full[0]) and torch.equal(some[1], full[1])
        assert torch.equal(some[2], full[2]) if grads[0] is not None else some[2] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.ones(2, 3)}, r"grad must have size 4 in dimension 1, got shape \[2, 3\]"),
        ({"grad": torch.ones(2, 4).half()}, "grad must be Float, got Half"),
        ({"grad": torch.ones(4)}, r"grad must have 2 dimensions \[T, H\], got shape \[4\]"),
        ({"x": torch.ones(2, 4).double()}, "x must be Float, BFloat16 or Half, got Double"),
        ({"weight": torch.ones(3)}, r"weight must have size 4 in dimension 0, got shape \[3\]"),
        ({"eps": -1.0}, "eps must be >= 0, got -1"),
    ],
)
def test_bad_input_raises(change, message, device):
    arguments = {"grad": torch.ones(2, 4), "x": torch.ones(2, 4), "weight": torch.ones(4), "eps": EPS} | change
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with pytest.raises(RuntimeError, match="rms_norm_backward: " + message):
        rms_norm_backward(**moved)


def test_bad_gradient_of_the_sum_raises(device):
    x, weight = torch.ones(2, 4, device=device), torch.ones(4, device=device)
    with pytest.raises(RuntimeError, match="add_rms_norm_backward: grad_sum must have size 2 in dimension 0"):
        add_rms_norm_backward(x, torch.ones(3, 4, device=device), x, weight, EPS)
    with pytest.raises(RuntimeError, match="add_rms_norm_backward: sum must be Float, BFloat16 or Half, got Double"):
        add_rms_norm_backward(x, None, x.double(), weight.double(), EPS)


def test_second_derivative_is_an_error_in_words(device):
    _, residual, x, weight = make((2, 4), device, torch.float32)
    with pytest.raises(RuntimeError, match="rms_norm_backward: gradients of gradients are not supported"):
        second_derivative("rms_norm", (x, weight, EPS))
    with pytest.raises(RuntimeError, match="add_rms_norm_backward: gradients of gradients are not supported"):
        second_derivative("add_rms_norm", (x, residual, weight, EPS))


def test_compiles(device):
    _, residual, x, weight = make((6, 16), device, torch.float32)
    assert_compiles("rms_norm", (x, weight, EPS))
    assert_compiles("add_rms_norm", (x, residual, weight, EPS))


@pytest.mark.parametrize("shape", [(0, 8), (3, 5), (40, 16)], ids=str)
def test_opcheck(shape, device, dtype):
    grad, grad_sum, x, weight = make(shape, device, dtype)
    leaves = (x.requires_grad_(), weight.requires_grad_())
    opcheck(torch.ops.mixtral.rms_norm.default, (*leaves, EPS))
    opcheck(torch.ops.mixtral.add_rms_norm.default, (leaves[0], grad_sum.requires_grad_(), leaves[1], EPS))
    plain = (x.detach(), weight.detach(), EPS)
    opcheck(rms_norm_backward, (grad, *plain))
    for want in ((True, False), (False, True)):
        opcheck(rms_norm_backward, (grad, *plain, *want))
        opcheck(add_rms_norm_backward, (grad, None, *plain, *want))
    opcheck(add_rms_norm_backward, (grad, grad_sum.detach(), *plain))
