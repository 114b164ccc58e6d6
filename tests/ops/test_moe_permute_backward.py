"""Gradients of moe_permute and moe_unpermute: closed form, tolerance, dropped copies, and the ways of autograd."""

import pytest
import torch

import mixtral.ops as ops
from conftest import assert_within_bound, opcheck, with_threads
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
from routing import ROUTINGS, make_routing
from routing_bounds import moe_permute_backward_bound, moe_unpermute_backward_bound

# T, H, E, K
CASES = [(0, 8, 4, 2), (1, 1, 1, 1), (3, 5, 2, 2), (7, 33, 3, 1), (65, 64, 8, 2), (129, 100, 16, 4)]
permute_backward = torch.ops.mixtral.moe_permute_backward.default
unpermute_backward = torch.ops.mixtral.moe_unpermute_backward.default


def make(case: tuple, routing: str, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """grad [T,H], y [M,H], weights [T,K], row_map [T,K]."""
    tokens, hidden, experts, top_k = case
    ids = make_routing(routing, tokens, experts, top_k, device)
    row_map = reference.moe_permute(torch.empty(tokens, 0, device=device), ids, experts)[2]
    grad, y = (normal(n, hidden, dtype=dtype).to(device) for n in (tokens, tokens * top_k))
    return grad, y, torch.rand(tokens, top_k, device=device), row_map


def random_choice(tokens: int, experts: int, top_k: int) -> torch.Tensor:
    return make_routing(ROUTINGS[torch.randint(len(ROUTINGS), ()).item()], tokens, experts, top_k)


def test_closed_form_is_the_derivative():
    _, y, weights, row_map = make((4, 3, 3, 2), "uniform", "cpu", torch.float64)
    for rows in (row_map, row_map.clone().index_fill(0, torch.tensor([1]), -1)):
        gradcheck_reference(
            lambda y, w, rows=rows: reference.moe_unpermute(y, w, rows),
            lambda grad, y, w, rows=rows: reference.moe_unpermute_backward(grad, y, w, rows),
            y,
            weights,
        )
    ids = make_routing("zipf", 4, 3, 2)
    rows = reference.moe_permute(y[:4], ids, 3)[2]
    gradcheck_reference(
        lambda x: reference.moe_permute(x, ids, 3)[0],
        lambda grad, x: reference.moe_permute_backward(grad, rows),
        y[:4],
    )


@pytest.mark.every_isa
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case, routing, device, dtype):
    grad, y, weights, row_map = make(case, routing, device, dtype)
    wide = grad.double(), y.double(), weights.double()
    for index in (row_map, row_map.long()):
        grad_x = permute_backward(y, index)
        expected = reference.moe_permute_backward(wide[1], row_map)
        assert_within_bound(grad_x, expected, moe_permute_backward_bound(y, row_map))
        actual = unpermute_backward(grad, y, weights, index)
        expected = reference.moe_unpermute_backward(*wide, row_map)
        bounds = moe_unpermute_backward_bound(grad, y, weights, row_map)
        for result, like, oracle, bound in zip(actual, (y, weights), expected, bounds, strict=True):
            assert result.dtype == like.dtype
            assert_within_bound(result, oracle, bound)


@pytest.mark.parametrize("dtype", RANDOM_CASE_DTYPES, ids=str)
def test_random_cases_of_moe_permute(device, dtype):
    def make_arguments(dtype):
        tokens, experts = size(60), size(12)
        return normal(tokens, size(150), dtype=dtype), random_choice(tokens, experts, size(4)), experts

    assert_random_cases("moe_permute", make_arguments, device, dtype)


@pytest.mark.parametrize("dtype", RANDOM_CASE_DTYPES, ids=str)
def test_random_cases_of_moe_unpermute(device, dtype):
    def make_arguments(dtype):
        tokens, experts, top_k = size(60), size(12), size(4)
        rows = reference.moe_permute(torch.empty(tokens, 0), random_choice(tokens, experts, top_k), experts)[2]
        return normal(tokens * top_k, size(150), dtype=dtype), torch.rand(tokens, top_k), rows

    assert_random_cases("moe_unpermute", make_arguments, device, dtype, moe_unpermute_backward_bound)


def test_gradient_of_permute_adds_in_the_order_of_k(device):
    grad = torch.tensor([[1e8], [1.0], [-1e8]], device=device)
    for row_map, expected in (([[0, 1, 2]], 0.0), ([[0, 2, 1]], 1.0)):
        assert permute_backward(grad, torch.tensor(row_map, device=device)).item() == expected


def test_dropped_copies_have_no_gradient_and_give_none(device, dtype):
    """Into memory that starts as NaN; the rows of y that no copy has hold NaN too."""
    y, grad = (normal(n, 20, dtype=dtype).to(device) for n in (4, 2))
    y[[0, 1, 3]] = float("nan")
    weights = torch.rand(2, 2, device=device)
    row_map = torch.tensor([[-1, 2], [-1, -1]], device=device)
    torch.use_deterministic_algorithms(True)
    try:
        grad_y, grad_weights = unpermute_backward(grad, y, weights, row_map)
        grad_x = permute_backward(y, row_map)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(grad_x, torch.stack([y[2], torch.zeros_like(y[2])]))
    assert (grad_y[[0, 1, 3]] == 0).all() and torch.equal(grad_y[2], (weights[0, 1] * grad[0].float()).to(dtype))
    assert grad_weights.flatten()[[0, 2, 3]].tolist() == [0, 0, 0] and grad_weights[0, 1] != 0


def test_router_gets_the_inner_product_of_gradient_and_expert_output(device):
    grad, y, weights, row_map = make((33, 20, 8, 2), "uniform", device, torch.float32)
    _, grad_weights = gradients(ops.moe_unpermute, (y, weights, row_map), (grad,))
    torch.testing.assert_close(grad_weights, (grad[:, None] * y[row_map.long()]).sum(-1))


@pytest.mark.every_isa
def test_bits_do_not_depend_on_threads_or_batch(dtype):
    grad, y, weights, row_map = make((1029, 100, 8, 2), "uniform", "cpu", dtype)
    assert_same_with_one_and_two_threads("moe_unpermute", (y, weights, row_map))
    assert_same_with_one_and_two_threads("moe_permute", (grad, make_routing("zipf", 1029, 8, 2), 8))
    grad_y, grad_weights = with_threads(2, lambda: unpermute_backward(grad, y, weights, row_map))
    for t in (0, 514, 1028):
        token, rows = slice(t, t + 1), row_map[t].long()
        alone = unpermute_backward(grad[token], y[rows], weights[token], torch.tensor([[0, 1]]))
        assert torch.equal(grad_y[rows], alone[0]) and torch.equal(grad_weights[token], alone[1])


def test_strided_inputs(device, dtype):
    arguments = make((9, 34, 6, 2), "uniform", device, dtype)
    expected = unpermute_backward(*arguments)
    for actual, want in zip(unpermute_backward(*(x.T.contiguous().T for x in arguments)), expected, strict=True):
        assert torch.equal(actual, want)
    assert torch.equal(
        permute_backward(arguments[1].T.contiguous().T, arguments[3]), permute_backward(arguments[1], arguments[3])
    )


def test_only_wanted_gradients(device, dtype):
    _, y, weights, row_map = make((40, 24, 4, 2), "uniform", device, dtype)
    assert_only_wanted_gradients("moe_unpermute", (y, weights, row_map))


Y, W, MAP = torch.ones(4, 3), torch.ones(2, 2), torch.tensor([[0, 1], [2, 3]])


@pytest.mark.parametrize(
    ("grad", "weights", "row_map", "message"),
    [
        (torch.ones(2), W, MAP, r"grad must have 2 dimensions \[T, H\], got shape \[2\]"),
        (torch.ones(2, 3).half(), W, MAP, "grad must be Float, got Half"),
        (torch.ones(3, 3), W, MAP, "grad must have size 2 in dimension 0"),
        (torch.ones(2, 4), W, MAP, "grad must have size 3 in dimension 1"),
        (torch.ones(2, 3), W[:1], MAP, "topk_weights must have size 2 in dimension 0"),
        (torch.ones(2, 3), W, MAP.float(), "row_map must be Int or Long, got Float"),
    ],
)
def test_bad_input_raises(grad, weights, row_map, message, device):
    with pytest.raises(RuntimeError, match="moe_unpermute_backward: " + message):
        unpermute_backward(grad.to(device), Y.to(device), weights.to(device), row_map.to(device))


def test_bad_rows_raise_on_cpu():
    for row_map, message in (
        ([[0, 1], [2, 4]], r"row_map must be in \[-1, 4\), got 4 at token 1"),
        ([[0, 1], [1, 3]], "row_map must hold a row once, got 1 again at token 1"),
    ):
        with pytest.raises(RuntimeError, match="moe_unpermute_backward: " + message):
            unpermute_backward(torch.ones(2, 3), Y, W, torch.tensor(row_map))
    with pytest.raises(RuntimeError, match=r"moe_permute_backward: row_map must be in \[-1, 4\), got -2 at token 0"):
        permute_backward(Y, torch.tensor([[-2, 0], [1, 2]]))
    with pytest.raises(RuntimeError, match="moe_permute_backward: grad must have size 4 in dimension 0"):
        permute_backward(Y[:3], MAP)


def test_second_derivative_is_an_error_in_words(device):
    _, y, weights, row_map = make((3, 4, 4, 2), "uniform", device, torch.float32)
    with pytest.raises(RuntimeError, match="moe_unpermute_backward: gradients of gradients are not supported"):
        second_derivative("moe_unpermute", (y, weights, row_map))
    with pytest.raises(RuntimeError, match="moe_permute_backward: gradients of gradients are not supported"):
        second_derivative("moe_permute", (y, make_routing("uniform", 6, 4, 2, device), 4))


def test_compiles(device):
    _, y, weights, row_map = make((6, 16, 4, 2), "uniform", device, torch.float32)
    assert_compiles("moe_unpermute", (y, weights, row_map))
    assert_compiles("moe_permute", (y, make_routing("uniform", 12, 4, 2, device), 4))


@pytest.mark.parametrize("case", [(0, 8, 4, 2), (7, 33, 3, 1), (9, 16, 8, 2)], ids=str)
def test_opcheck(case, device, dtype):
    arguments = make(case, "uniform", device, dtype)
    opcheck(permute_backward, (arguments[1], arguments[3]))
    for want in ((True, True), (True, False), (False, True)):
        opcheck(unpermute_backward, (*arguments, *want))
