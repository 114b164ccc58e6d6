"""Gradients of topk_softmax: closed form, tolerance, the bias, invariances, and the ways of autograd."""

import pytest
import torch

import mixtral.ops as ops
from conftest import assert_within_bound, opcheck, with_threads
from gradients import (
    RANDOM_CASE_DTYPES,
    assert_compiles,
    assert_random_cases,
    assert_same_with_one_and_two_threads,
    gradcheck_reference,
    normal,
    second_derivative,
    size,
)
from mixtral import reference
from routing_bounds import topk_softmax_backward_bound, topk_softmax_gradient_bound

# T, E, K
CASES = [(0, 8, 2), (1, 1, 1), (3, 2, 1), (7, 3, 3), (33, 8, 2), (65, 16, 4), (5, 100, 7)]
RENORMALIZE = pytest.mark.parametrize("renormalize", [True, False], ids=["renormalize", "plain"])
backward = torch.ops.mixtral.topk_softmax_backward.default


def make(case: tuple, device: str, dtype: torch.dtype, renormalize: bool = True) -> tuple[torch.Tensor, ...]:
    """grad, logits, weights, ids."""
    tokens, experts, top_k = case
    logits = (3 * normal(tokens, experts, dtype=torch.float64)).to(device, dtype)
    return torch.randn(tokens, top_k, device=device), logits, *ops.topk_softmax(logits, top_k, renormalize)


def logits_with_a_margin(tokens: int, experts: int) -> torch.Tensor:
    """f64; the logits of a row are at least 1/4 apart, so that finite differences do not change the choice."""
    order = torch.rand(tokens, experts).argsort(-1).double()
    return order / 2 + torch.rand(tokens, experts, dtype=torch.float64) / 4


@RENORMALIZE
@pytest.mark.parametrize("case", [(1, 1, 1), (1, 5, 1), (3, 4, 2), (2, 4, 4)], ids=str)
def test_closed_form_is_the_derivative(case, renormalize):
    tokens, experts, top_k = case

    def closed_form(grad, logits):
        weights, ids = reference.topk_softmax(logits, top_k, renormalize)
        return reference.topk_softmax_backward(grad, logits, weights, ids, renormalize)

    logits = logits_with_a_margin(tokens, experts)
    gradcheck_reference(lambda x: reference.topk_softmax(x, top_k, renormalize)[0], closed_form, logits)


@pytest.mark.every_isa
@RENORMALIZE
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case, renormalize, device, dtype):
    arguments = make(case, device, dtype, renormalize)
    wide = [x.double() for x in arguments[:3]]
    for ids in (arguments[3], arguments[3].long()):
        actual = backward(*arguments[:3], ids, renormalize)
        assert actual.dtype == dtype
        expected = reference.topk_softmax_backward(*wide, ids, renormalize)
        assert_within_bound(actual, expected, topk_softmax_backward_bound(*arguments, renormalize))


@pytest.mark.parametrize("dtype", RANDOM_CASE_DTYPES, ids=str)
def test_random_cases(device, dtype):
    def make_arguments(dtype):
        experts = size(40)
        logits = (3 * normal(size(80), experts, dtype=torch.float64)).to(dtype)
        return logits, min(size(8), experts), torch.rand(()).item() < 0.5

    assert_random_cases("topk_softmax", make_arguments, device, dtype, topk_softmax_gradient_bound)


def test_renormalised_experts_that_were_not_chosen_get_exactly_nothing(device, dtype):
    grad, logits, weights, ids = make((33, 8, 2), device, dtype)
    out = backward(grad, logits, weights, ids)
    chosen = torch.zeros_like(out, dtype=torch.bool).scatter(1, ids.long(), True)
    assert (out[~chosen] == 0).all() and (out[chosen] != 0).any()


def test_top_1_learns_only_without_renormalisation(device):
    for renormalize in (True, False):
        logits = torch.randn(5, 4, device=device, requires_grad=True)
        ops.topk_softmax(logits, 1, renormalize)[0].sum().backward()
        assert (logits.grad != 0).any() == (not renormalize)


@RENORMALIZE
def test_bias_has_no_gradient_and_leaves_that_of_its_choice(renormalize, device, dtype):
    logits = normal(33, 8, dtype=dtype).to(device).requires_grad_()
    bias = (torch.randn(8, device=device) / 4).requires_grad_()
    weights, ids = ops.topk_softmax(logits, 2, renormalize, bias)
    assert not torch.equal(ids, ops.topk_softmax(logits, 2)[1])
    grad = torch.randn_like(weights)
    weights.backward(grad)
    assert bias.grad is None
    assert torch.equal(logits.grad, backward(grad, logits.detach(), weights.detach(), ids, renormalize))
    wide = logits.detach().double().requires_grad_()
    p = wide.softmax(-1).gather(1, ids.long())
    (p / p.sum(-1, keepdim=True) if renormalize else p).backward(grad.double())
    torch.testing.assert_close(logits.grad.double(), wide.grad, atol=1e-6, rtol=4 * torch.finfo(dtype).eps)


@pytest.mark.every_isa
def test_bits_do_not_depend_on_threads_or_batch(dtype):
    grad, logits, weights, ids = make((4097, 8, 2), "cpu", dtype)
    for renormalize in (True, False):
        assert_same_with_one_and_two_threads("topk_softmax", (logits, 2, renormalize))
        whole = with_threads(2, lambda: backward(grad, logits, weights, ids, renormalize))  # noqa: B023
        for t in (0, 2048, 4096):
            rows = slice(t, t + 1)
            alone = backward(grad[rows], logits[rows], weights[rows], ids[rows], renormalize)
            assert torch.equal(whole[rows], alone)


def test_strided_inputs(device, dtype):
    grad, logits, weights, ids = make((9, 8, 4), device, dtype)
    for renormalize in (True, False):
        expected = backward(grad, logits, weights, ids, renormalize)
        strided = [x.T.contiguous().T for x in (grad, logits, weights, ids)]
        assert torch.equal(backward(*strided, renormalize), expected)
        expanded = backward(grad[:1].expand(9, -1), logits, weights, ids, renormalize)
        assert torch.equal(expanded, backward(grad[:1].repeat(9, 1), logits, weights, ids, renormalize))


def test_nan_stays_in_its_row(device, dtype):
    grad, logits, _, _ = make((3, 4, 2), device, dtype)
    for renormalize in (True, False):
        clean = backward(grad, logits, *ops.topk_softmax(logits, 2, renormalize), renormalize)
        broken = logits.clone()
        broken[1, 2] = float("nan")
        out = backward(grad, broken, *ops.topk_softmax(broken, 2, renormalize), renormalize)
        assert out[1].isnan().any() and torch.equal(out[[0, 2]], clean[[0, 2]])


def test_unused_weights_give_no_gradient(device):
    logits = torch.randn(3, 4, device=device, requires_grad=True)
    _, ids = ops.topk_softmax(logits, 2)
    assert not ids.requires_grad
    (logits.sum() + ids.sum()).backward()
    assert torch.equal(logits.grad, torch.ones_like(logits))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.ones(2, 3)}, r"grad must have size 2 in dimension 1, got shape \[2, 3\]"),
        ({"grad": torch.ones(2, 2).half()}, "grad must be Float, got Half"),
        ({"router_logits": torch.ones(4)}, r"router_logits must have 2 dimensions \[T, E\], got shape \[4\]"),
        ({"router_logits": torch.ones(2, 4).double()}, "router_logits must be Float, BFloat16 or Half, got Double"),
        ({"router_logits": torch.ones(3, 4)}, r"topk_ids must have size 3 in dimension 0, got shape \[2, 2\]"),
        ({"topk_weights": torch.ones(1, 2)}, r"topk_weights must have size 2 in dimension 0, got shape \[1, 2\]"),
        ({"topk_ids": torch.ones(2, 2)}, "topk_ids must be Int or Long, got Float"),
    ],
)
def test_bad_input_raises(change, message, device):
    ones, ids = torch.ones(2, 2), torch.zeros(2, 2).int()
    arguments = {"grad": ones, "router_logits": torch.ones(2, 4), "topk_weights": ones, "topk_ids": ids} | change
    with pytest.raises(RuntimeError, match="topk_softmax_backward: " + message):
        backward(**{name: x.to(device) for name, x in arguments.items()})


@pytest.mark.parametrize("bad", [-1, 4, 2**32])
def test_bad_id_is_an_error_on_cpu(bad):
    ids = torch.tensor([[0, 1], [2, bad]])
    with pytest.raises(RuntimeError, match=rf"topk_ids must be in \[0, 4\), got {bad} at token 1"):
        backward(torch.ones(2, 2), torch.ones(2, 4), torch.ones(2, 2), ids)


def test_second_derivative_is_an_error_in_words(device):
    with pytest.raises(RuntimeError, match="topk_softmax_backward: gradients of gradients are not supported"):
        second_derivative("topk_softmax", (torch.randn(3, 4, device=device), 2))


def test_compiles(device):
    for renormalize in (True, False):
        assert_compiles("topk_softmax", (torch.randn(6, 4, device=device), 2, renormalize))


@pytest.mark.parametrize("case", [(0, 8, 2), (5, 3, 1), (33, 8, 2)], ids=str)
def test_opcheck(case, device, dtype):
    for renormalize in (True, False):
        opcheck(backward, (*make(case, device, dtype, renormalize), renormalize))
