"""Gradients of router_logits and moe_route: closed form, tolerance, order of sums, invariances, ways of autograd."""

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
from routing_bounds import moe_route_gradient_bound, router_logits_backward_bound

# T, H, E
CASES = [(0, 8, 4), (1, 1, 1), (3, 5, 2), (7, 33, 3), (65, 128, 8), (33, 260, 17), (600, 70, 9)]
ROUTERS = ["float32", "model"]
logits_backward = torch.ops.mixtral.router_logits_backward.default
route_backward = torch.ops.mixtral.moe_route_backward.default


def make(case: tuple, router_dtype: str, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """grad, x, router."""
    tokens, hidden, experts = case
    router = normal(experts, hidden, dtype=torch.float64) / hidden**0.5
    grad = torch.randn(tokens, experts, device=device)
    x = normal(tokens, hidden, dtype=dtype).to(device)
    return grad, x, router.to(device, dtype if router_dtype == "model" else torch.float32)


def exact_products(tokens: int, hidden: int, experts: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x, f32 router: their logits are exact in any order, so that every precision chooses alike."""
    x = torch.randint(-8, 9, (tokens, hidden)).to(dtype)
    return x, torch.randint(-8, 9, (experts, hidden)).float() / 64


def test_closed_form_is_the_derivative():
    x, router = normal(3, 5, dtype=torch.float64), normal(4, 5, dtype=torch.float64)
    gradcheck_reference(reference.router_logits, reference.router_logits_backward, x, router)
    logits = reference.router_logits(x, router).sort(-1).values
    assert logits.diff(dim=-1).min() > 1e-3  # the choice stays
    for top_k, renormalize in ((1, False), (2, True), (4, True)):

        def closed_form(grad, x, router, top_k=top_k, renormalize=renormalize):
            choice = reference.moe_route(x, router, top_k, renormalize)
            return reference.moe_route_backward(grad, x, router, *choice, renormalize)

        def weights(x, router, top_k=top_k, renormalize=renormalize):
            return reference.moe_route(x, router, top_k, renormalize)[0]

        gradcheck_reference(weights, closed_form, x, router)


@pytest.mark.every_isa
@pytest.mark.parametrize("router_dtype", ROUTERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case, router_dtype, device, dtype):
    arguments = make(case, router_dtype, device, dtype)
    expected = reference.router_logits_backward(*(y.double() for y in arguments))
    bounds = router_logits_backward_bound(*arguments)
    actual = logits_backward(*arguments)
    for result, like, oracle, bound in zip(actual, arguments[1:], expected, bounds, strict=True):
        assert result.dtype == like.dtype
        assert_within_bound(result, oracle, bound)


@pytest.mark.parametrize("dtype", RANDOM_CASE_DTYPES, ids=str)
def test_random_cases_of_router_logits(device, dtype):
    def make_arguments(dtype):
        hidden = size(200)
        router = normal(size(20), hidden, dtype=torch.float32 if torch.rand(()) < 0.5 else dtype)
        return normal(size(300), hidden, dtype=dtype), router

    assert_random_cases("router_logits", make_arguments, device, dtype, router_logits_backward_bound)


@pytest.mark.parametrize("dtype", RANDOM_CASE_DTYPES, ids=str)
def test_random_cases_of_moe_route(device, dtype):
    def make_arguments(dtype):
        experts = size(20)
        x, router = exact_products(size(80), size(200), experts, dtype)
        return x, router, min(size(5), experts), torch.rand(()).item() < 0.5

    assert_random_cases("moe_route", make_arguments, device, dtype, moe_route_gradient_bound)


@pytest.mark.every_isa
@pytest.mark.parametrize("router_dtype", ROUTERS)
@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalize", "plain"])
def test_moe_route_has_the_gradient_of_its_halves_bit_for_bit(renormalize, router_dtype, device, dtype):
    _, x, router = make((70, 48, 8), router_dtype, device, dtype)
    grad, bias = torch.randn(70, 2, device=device), torch.rand(8, device=device)
    for options in ((2, renormalize), (2, renormalize, bias)):
        whole = gradients(lambda *y: ops.moe_route(*y, *options), (x, router), (grad,))  # noqa: B023
        halves = gradients(
            lambda *y: ops.topk_softmax(ops.router_logits(*y), *options),  # noqa: B023
            (x, router),
            (grad,),
        )
        for a, b in zip(whole, halves, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b) and (a != 0).any()


@pytest.mark.every_isa
def test_sums_over_tokens_are_chains_of_256_in_order():
    grad = torch.randn(600, 3) * 2.0 ** torch.randint(0, 24, (600, 3))
    total = torch.zeros(3)
    for chain in grad.split(256):
        of_chain = torch.zeros(3)
        for row in chain:
            of_chain = of_chain + row
        total = total + of_chain
    assert torch.equal(logits_backward(grad, torch.ones(600, 5), torch.ones(3, 5))[1], total[:, None].expand(-1, 5))


@pytest.mark.every_isa
def test_bits_do_not_depend_on_threads_or_batch(dtype):
    grad, x, router = make((1029, 200, 8), "float32", "cpu", dtype)
    assert_same_with_one_and_two_threads("router_logits", (x, router))
    assert_same_with_one_and_two_threads("moe_route", (x, router, 2, False))
    whole = with_threads(2, lambda: logits_backward(grad, x, router))[0]
    for t in (0, 514, 1028):
        rows = slice(t, t + 1)
        assert torch.equal(whole[rows], logits_backward(grad[rows], x[rows], router)[0])


def test_strided_inputs(device, dtype):
    grad, x, router = make((9, 34, 6), "float32", device, dtype)
    expected = logits_backward(grad, x, router)
    for actual, want in zip(logits_backward(*(y.T.contiguous().T for y in (grad, x, router))), expected, strict=True):
        assert torch.equal(actual, want)
    for actual, want in zip(
        logits_backward(grad[:1].expand(9, -1), x, router),
        logits_backward(grad[:1].repeat(9, 1), x, router),
        strict=True,
    ):
        assert torch.equal(actual, want)


def test_nan_stays_in_its_row_and_column(device, dtype):
    grad, x, router = make((5, 40, 8), "float32", device, dtype)
    clean = logits_backward(grad, x, router)
    x[1, 3] = float("nan")
    grad_x, grad_router = logits_backward(grad, x, router)
    assert torch.equal(grad_x, clean[0])
    assert grad_router[:, 3].isnan().all() and torch.equal(grad_router[:, 4:], clean[1][:, 4:])


def test_gradients_without_tokens_are_zero(device, dtype):
    grad, x, router = make((0, 40, 8), "float32", device, dtype)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        grad_x, grad_router = logits_backward(grad, x, router)
    finally:
        torch.use_deterministic_algorithms(False)
    assert grad_x.shape == (0, 40) and torch.equal(grad_router, torch.zeros_like(router))


def test_only_wanted_gradients(device, dtype):
    _, x, router = make((40, 24, 4), "float32", device, dtype)
    assert_only_wanted_gradients("router_logits", (x, router))
    assert_only_wanted_gradients("moe_route", (x, router, 2))


ONES, IDS = torch.ones(3, 1), torch.zeros(3, 1).int()


@pytest.mark.parametrize(
    ("grad", "x", "router", "message"),
    [
        (torch.ones(3, 2), torch.ones(4), torch.ones(2, 4), r"x must have 2 dimensions \[T, H\], got shape \[4\]"),
        (torch.ones(3, 2), torch.ones(3, 4), torch.ones(2, 5), "router must have size 4 in dimension 1, got"),
        (torch.ones(3, 2), torch.ones(3, 4), torch.ones(2, 4).half(), "router must be Float or have the dtype of x"),
        (torch.ones(2), torch.ones(3, 4), torch.ones(2, 4), r"grad must have 2 dimensions \[T, E\], got shape \[2\]"),
        (torch.ones(3, 2).half(), torch.ones(3, 4), torch.ones(2, 4), "grad must be Float, got Half"),
        (torch.ones(4, 2), torch.ones(3, 4), torch.ones(2, 4), "grad must have size 3 in dimension 0, got"),
        (torch.ones(3, 3), torch.ones(3, 4), torch.ones(2, 4), "grad must have size 2 in dimension 1, got"),
    ],
)
def test_bad_input_raises(grad, x, router, message, device):
    with pytest.raises(RuntimeError, match="router_logits_backward: " + message):
        logits_backward(grad.to(device), x.to(device), router.to(device))


def test_bad_choice_raises(device):
    x, router = torch.ones(3, 4, device=device), torch.ones(2, 4, device=device)
    ones, ids = ONES.to(device), IDS.to(device)
    with pytest.raises(RuntimeError, match="moe_route_backward: grad must have size 3 in dimension 0"):
        route_backward(ones[:2], x, router, ones, ids)
    with pytest.raises(RuntimeError, match="moe_route_backward: topk_ids must be Int or Long, got Float"):
        route_backward(ones, x, router, ones, ones)


def test_second_derivative_is_an_error_in_words(device):
    _, x, router = make((3, 4, 4), "float32", device, torch.float32)
    with pytest.raises(RuntimeError, match="router_logits_backward: gradients of gradients are not supported"):
        second_derivative("router_logits", (x, router))
    with pytest.raises(RuntimeError, match="moe_route_backward: gradients of gradients are not supported"):
        second_derivative("moe_route", (x, router, 2))


def test_compiles(device):
    _, x, router = make((6, 16, 4), "float32", device, torch.float32)
    assert_compiles("router_logits", (x, router))
    assert_compiles("moe_route", (x, router, 2))


@pytest.mark.parametrize("router_dtype", ROUTERS)
@pytest.mark.parametrize("case", [(0, 8, 4), (5, 12, 3)], ids=str)
def test_opcheck(case, router_dtype, device, dtype):
    grad, x, router = make(case, router_dtype, device, dtype)
    choice = ops.moe_route(x, router, 2, False)
    for want in ((True, True), (True, False), (False, True)):
        opcheck(logits_backward, (grad, x, router, *want))
        opcheck(route_backward, (torch.randn_like(choice[0]), x, router, *choice, False, *want))
