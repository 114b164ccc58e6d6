"""router_losses and its gradient: sums, masks that change no bit, sums that add, invariances and errors."""

import pytest
import torch

import mixtral.ops as ops
from conftest import assert_within_bound, assert_within_tolerance, opcheck, with_threads
from gradients import (
    RANDOM_CASE_DTYPES,
    assert_compiles,
    assert_random_cases,
    assert_same_with_one_and_two_threads,
    gradcheck_reference,
    gradients,
    normal,
    second_derivative,
    size,
)
from mixtral import reference
from routing_bounds import router_losses_backward_bound

# T, E, K
CASES = [(0, 8, 2), (1, 1, 1), (3, 2, 1), (7, 3, 3), (33, 8, 2), (65, 16, 4), (700, 100, 7)]
MASKED = pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
NAN = float("nan")
backward = torch.ops.mixtral.router_losses_backward.default


def make(case: tuple, masked: bool, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """logits, ids, mask."""
    tokens, experts, top_k = case
    logits = (3 * normal(tokens, experts, dtype=torch.float64)).to(device, dtype)
    ids = torch.rand(tokens, experts, device=device).argsort(-1)[:, :top_k].int()
    return logits, ids, torch.rand(tokens, device=device) < 0.7 if masked else None


@MASKED
def test_closed_form_is_the_derivative(masked):
    logits, ids, mask = make((5, 4, 2), masked, "cpu", torch.float64)
    gradcheck_reference(
        lambda x: reference.router_losses(x, ids, mask)[1:3],
        lambda grad_prob, grad_z, x: reference.router_losses_backward(grad_prob, grad_z, x, mask),
        logits,
    )


@pytest.mark.every_isa
@MASKED
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case, masked, device, dtype):
    logits, ids, mask = make(case, masked, device, dtype)
    for index in (ids, ids.long()):
        load, prob_sum, z_sum, count = ops.router_losses(logits, index, mask)
        assert load.dtype == count.dtype == torch.int64
        assert_within_tolerance("router_losses", (load, prob_sum, z_sum, count), logits, ids, mask)


@pytest.mark.every_isa
@MASKED
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_matches_reference(case, masked, device, dtype):
    logits, _, mask = make(case, masked, device, dtype)
    grad_prob, grad_z = torch.randn(case[1], device=device), torch.randn((), device=device)
    actual = backward(grad_prob, grad_z, logits, mask)
    assert actual.dtype == dtype
    expected = reference.router_losses_backward(grad_prob.double(), grad_z.double(), logits.double(), mask)
    assert_within_bound(actual, expected, router_losses_backward_bound(grad_prob, grad_z, logits, mask))


@pytest.mark.parametrize("dtype", RANDOM_CASE_DTYPES, ids=str)
def test_random_cases(device, dtype):
    def make_arguments(dtype):
        experts = size(40)
        return make((size(80), experts, min(size(4), experts)), torch.rand(()).item() < 0.5, "cpu", dtype)

    def bounds(grad_prob, grad_z, logits, ids, mask):
        return (router_losses_backward_bound(grad_prob, grad_z, logits, mask),)

    assert_random_cases("router_losses", make_arguments, device, dtype, bounds)


@pytest.mark.every_isa
@pytest.mark.parametrize("filler", [0.0, NAN, float("inf"), 3e38])
def test_masked_rows_change_no_bit(filler, dtype):
    """Padding between the tokens, whatever it holds, bad ids too: the sums and gradients are those without it."""
    logits, ids, _ = make((300, 8, 2), False, "cpu", dtype)
    mask = torch.zeros(900, dtype=torch.bool)
    mask[torch.randperm(900)[:300]] = True
    padded, padded_ids = torch.full((900, 8), filler).to(dtype), torch.full((900, 2), -7)
    padded[mask], padded_ids[mask] = logits, ids.long()
    for actual, expected in zip(
        ops.router_losses(padded, padded_ids, mask), ops.router_losses(logits, ids), strict=True
    ):
        assert torch.equal(actual, expected)
    grads = torch.randn(8), torch.randn(())
    actual = backward(*grads, padded, mask)
    assert torch.equal(actual[mask], backward(*grads, logits)) and (actual[~mask] == 0).all()


def test_nothing_but_padding(device, dtype):
    logits = torch.full((3, 4), NAN, device=device, dtype=dtype)
    ids, mask = torch.zeros(3, 2, device=device).int(), torch.zeros(3, device=device).bool()
    for sums in ops.router_losses(logits, ids, mask):
        assert (sums == 0).all()
    grads = torch.ones(4, device=device), torch.ones((), device=device)
    assert torch.equal(backward(*grads, logits, mask), torch.zeros_like(logits))


def test_sums_of_parts_add_up(device, dtype):
    logits, ids, mask = make((512, 8, 2), True, device, dtype)
    whole = ops.router_losses(logits, ids, mask)
    parts = [ops.router_losses(logits[i : i + 64], ids[i : i + 64], mask[i : i + 64]) for i in range(0, 512, 64)]
    load, prob_sum, z_sum, count = (sum(x) for x in zip(*parts, strict=True))
    assert torch.equal(load, whole[0]) and torch.equal(count, whole[3])
    torch.testing.assert_close((prob_sum, z_sum), whole[1:3], rtol=1e-6, atol=0)


def test_load_counts_choices(device):
    ids = torch.tensor([[0, 3], [3, 1], [3, 3]], device=device)
    logits, mask = torch.zeros(3, 5, device=device), torch.tensor([True, True, False], device=device)
    load, prob_sum, z_sum, count = ops.router_losses(logits, ids)
    assert load.tolist() == [1, 1, 0, 4, 0] and count.item() == 3
    torch.testing.assert_close(prob_sum, torch.full((5,), 0.6, device=device))
    torch.testing.assert_close(z_sum.item(), 3 * torch.tensor(5.0).log().square().item())
    assert ops.router_losses(logits, ids, mask)[0].tolist() == [1, 1, 0, 2, 0]


def test_nan_of_a_token_shows(device, dtype):
    logits, ids, _ = make((9, 4, 2), False, device, dtype)
    logits[3, 1] = NAN
    _, prob_sum, z_sum, _ = ops.router_losses(logits, ids)
    assert prob_sum.isnan().all() and z_sum.isnan()


@pytest.mark.every_isa
def test_bits_do_not_depend_on_threads(dtype):
    arguments = make((5000, 8, 2), True, "cpu", dtype)
    one, two = (with_threads(n, lambda: ops.router_losses(*arguments)) for n in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert_same_with_one_and_two_threads("router_losses", arguments)


def test_strided_inputs(device, dtype):
    logits, ids, mask = make((33, 8, 4), True, device, dtype)
    strided = logits.T.contiguous().T, ids.T.contiguous().T, torch.stack([mask, mask], 1)[:, 0]
    for actual, want in zip(ops.router_losses(*strided), ops.router_losses(logits, ids, mask), strict=True):
        assert torch.equal(actual, want)
    grads = torch.randn(1, device=device).expand(8), torch.randn((), device=device)
    expected = backward(grads[0].contiguous(), grads[1], logits, mask)
    assert torch.equal(backward(*grads, strided[0], strided[2]), expected)


def test_results_that_are_not_used(device, dtype):
    arguments = make((33, 8, 2), True, device, dtype)
    grad_prob, grad_z = torch.randn(8, device=device), torch.randn((), device=device)
    for grads in ((grad_prob, None), (None, grad_z)):
        some = gradients(ops.router_losses, arguments, grads)[0]
        full = [torch.zeros(shape, device=device) if x is None else x for x, shape in zip(grads, (8, ()), strict=True)]
        assert torch.equal(some, backward(*full, arguments[0], arguments[2]))


ONES, IDS, MASK = torch.ones(2, 4), torch.zeros(2, 1).int(), torch.ones(2).bool()


@pytest.mark.parametrize(
    ("logits", "ids", "mask", "message"),
    [
        (torch.ones(4), IDS, MASK, r"router_logits must have 2 dimensions \[T, E\], got shape \[4\]"),
        (ONES.double(), IDS, MASK, "router_logits must be Float, BFloat16 or Half, got Double"),
        (ONES, IDS.float(), MASK, "topk_ids must be Int or Long, got Float"),
        (ONES, IDS[0], MASK, r"topk_ids must have 2 dimensions \[T, K\], got shape \[1\]"),
        (ONES, IDS[:1], MASK, r"topk_ids must have size 2 in dimension 0, got shape \[1, 1\]"),
        (ONES, IDS, MASK.int(), "mask must be Bool, got Int"),
        (ONES, IDS, MASK[:1], r"mask must have size 2 in dimension 0, got shape \[1\]"),
    ],
)
def test_bad_input_raises(logits, ids, mask, message, device):
    with pytest.raises(RuntimeError, match="router_losses: " + message):
        ops.router_losses(logits.to(device), ids.to(device), mask.to(device))


@pytest.mark.parametrize("bad", [-1, 4, 2**32])
def test_bad_id_is_an_error_on_cpu_and_not_counted_on_cuda(bad, device):
    ids = torch.tensor([[0, 1], [2, bad]], device=device)
    if device == "cpu":
        with pytest.raises(RuntimeError, match=rf"router_losses: topk_ids must be in \[0, 4\), got {bad} at token 1"):
            ops.router_losses(ONES, ids)
    else:
        assert ops.router_losses(ONES.to(device), ids)[0].tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("grad_prob", "grad_z", "message"),
    [
        (torch.ones(3), torch.ones(()), r"grad_prob_sum must have size 4 in dimension 0, got shape \[3\]"),
        (torch.ones(4).half(), torch.ones(()), "grad_prob_sum must be Float, got Half"),
        (torch.ones(4), torch.ones(1), r"grad_z_sum must have 0 dimensions \[\], got shape \[1\]"),
    ],
)
def test_bad_gradient_raises(grad_prob, grad_z, message, device):
    with pytest.raises(RuntimeError, match="router_losses_backward: " + message):
        backward(grad_prob.to(device), grad_z.to(device), ONES.to(device))


def test_second_derivative_is_an_error_in_words(device):
    logits, ids, mask = make((3, 4, 2), True, device, torch.float32)
    with pytest.raises(RuntimeError, match="router_losses_backward: gradients of gradients are not supported"):
        second_derivative("router_losses", (logits, ids, mask))


def test_compiles(device):
    assert_compiles("router_losses", make((6, 4, 2), True, device, torch.float32))


@MASKED
@pytest.mark.parametrize("case", [(0, 8, 2), (5, 3, 1)], ids=str)
def test_opcheck(case, masked, device, dtype):
    logits, ids, mask = make(case, masked, device, dtype)
    opcheck(backward, (torch.randn(case[1], device=device), torch.randn((), device=device), logits, mask))
    op = torch.ops.mixtral.router_losses.default
    opcheck(op, (logits, ids, mask))
    # With gradients but for AOT dispatch, whose check cannot add up results that begin with integers: test_compiles.
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(op, (logits.requires_grad_(), ids, mask), test_utils=checks)
