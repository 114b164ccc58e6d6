"""topk_softmax against the f64 reference: ties, NaN and infinite logits, invariances and errors."""

import pytest
import torch

import mixtral.ops as ops
from conftest import assert_within_tolerance, opcheck, with_threads

CASES = [(0, 8, 2), (1, 1, 1), (3, 2, 1), (7, 3, 3), (33, 8, 2), (65, 16, 4), (5, 100, 7)]
INF, NAN = float("inf"), float("nan")


@pytest.mark.every_isa
@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalize", "plain"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case, renormalize, device, dtype):
    tokens, experts, top_k = case
    logits = (3 * torch.randn(tokens, experts, device=device, dtype=torch.float64)).to(dtype)
    weights, ids = ops.topk_softmax(logits, top_k, renormalize)
    assert ids.dtype == torch.int32
    assert_within_tolerance("topk_softmax", (weights, ids), logits, top_k, renormalize)


@pytest.mark.every_isa
def test_ties_go_to_the_smaller_id(device, dtype):
    logits = torch.tensor([[1, 2, 2, 1, 2], [0, 0, 0, 0, 0]], device=device, dtype=dtype)
    assert ops.topk_softmax(logits, 4)[1].tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    "row",
    [[NAN, 1, 2, 3], [3, 2, NAN, 1], [NAN] * 4, [INF, 0, 1, 2], [INF, INF, NAN, -INF], [-INF] * 4],
    ids=str,
)
@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalize", "plain"])
def test_not_a_distribution_gives_nan_weights_in_its_row_alone(row, renormalize, device, dtype):
    logits = torch.randn(3, 4, device=device).to(dtype)
    clean_weights, clean_ids = ops.topk_softmax(logits, 3, renormalize)
    logits[1] = torch.tensor(row)
    weights, ids = ops.topk_softmax(logits, 3, renormalize)
    assert weights[1].isnan().all()
    assert len(set(ids[1].tolist())) == 3 and set(ids[1].tolist()) <= set(range(4))
    assert torch.equal(weights[[0, 2]], clean_weights[[0, 2]]) and torch.equal(ids[[0, 2]], clean_ids[[0, 2]])


def test_nan_logits_rank_last(device):
    logits = torch.tensor([[NAN, 1.0, NAN, 5.0]], device=device)
    assert ops.topk_softmax(logits, 4)[1].tolist() == [[3, 1, 0, 2]]


def test_huge_and_masked_logits_are_finite(device):
    logits = torch.tensor([[3e38, -3e38, 3e38, 0], [-3e38, -3e38, -3e38, -3e38], [-INF, 1, -INF, -INF]], device=device)
    weights, ids = ops.topk_softmax(logits, 2)
    assert torch.equal(weights.cpu(), torch.tensor([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]]))
    assert ids.tolist() == [[0, 2], [0, 1], [1, 0]]


def test_strided_logits(device, dtype):
    wide = torch.randn(9, 17, device=device).to(dtype)
    for logits in (wide[:, ::2], wide.T, wide[:1].expand(4, -1), wide[:, 1:]):
        expected = ops.topk_softmax(logits.contiguous(), 3)
        for actual, want in zip(ops.topk_softmax(logits, 3), expected, strict=True):
            assert torch.equal(actual, want)


def test_row_does_not_depend_on_batch_or_threads(device, dtype):
    logits = torch.randn(4097, 8, device=device).to(dtype)
    weights, ids = with_threads(2, lambda: ops.topk_softmax(logits, 2))
    assert torch.equal(weights, with_threads(1, lambda: ops.topk_softmax(logits, 2)[0]))
    for t in (0, 2048, 4096):
        alone = ops.topk_softmax(logits[t : t + 1], 2)
        assert torch.equal(weights[t : t + 1], alone[0]) and torch.equal(ids[t : t + 1], alone[1])


@pytest.mark.parametrize(
    ("logits", "top_k", "message"),
    [
        (torch.ones(4), 1, r"topk_softmax: router_logits must have 2 dimensions \[T, E\], got shape \[4\]"),
        (torch.ones(2, 4).long(), 1, "topk_softmax: router_logits must be Float, BFloat16 or Half, got Long"),
        (torch.ones(2, 4), 0, r"topk_softmax: top_k must be in \[1, 4\], got 0"),
        (torch.ones(2, 4), 5, r"topk_softmax: top_k must be in \[1, 4\], got 5"),
        (torch.ones(2, 0), 1, r"topk_softmax: top_k must be in \[1, 0\], got 1"),
    ],
)
def test_bad_input_raises(logits, top_k, message, device):
    with pytest.raises(RuntimeError, match=message):
        ops.topk_softmax(logits.to(device), top_k)


@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalize", "plain"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_select_bias_moves_the_choice_alone(case, renormalize, device, dtype):
    """The choice is that of p + bias in f64; the weights have the bits that the chosen experts have without a bias."""
    tokens, experts, top_k = case
    logits = torch.randn(tokens, experts, device=device).to(dtype)
    bias = torch.randn(experts, device=device) / 4
    weights, ids = ops.topk_softmax(logits, top_k, renormalize, bias)
    scores = (logits.double().softmax(-1) + bias).sort(dim=-1, descending=True)
    decided = (scores.values[:, : top_k + 1].diff(dim=-1) < -1e-6).all(-1)
    assert torch.equal(ids[decided].long(), scores.indices[decided, :top_k]) and decided.sum() >= 0.9 * tokens
    p, order = ops.topk_softmax(logits, experts, renormalize=False)
    chosen = torch.zeros_like(p).scatter(1, order.long(), p).gather(1, ids.long())
    if renormalize:
        torch.testing.assert_close(weights, chosen / chosen.sum(-1, keepdim=True), rtol=1e-6, atol=0)
    else:
        assert torch.equal(weights, chosen)


def test_select_bias_decides_between_experts(device, dtype):
    logits = torch.tensor([[2, 0, 0, 1.5]], device=device, dtype=dtype)
    for bias, expected in (([0, 0, 0, 0], [0, 3]), ([-9, 0, 1, 0], [2, 3]), ([0, 9, 9, 0], [1, 2])):
        select_bias = torch.tensor(bias, device=device, dtype=torch.float32)
        assert ops.topk_softmax(logits, 2, True, select_bias)[1].tolist() == [expected]


def test_chosen_experts_far_below_the_largest_share_by_their_logits(device, dtype):
    """Their probabilities are zero in f32."""
    logits = torch.tensor([[0, -200, -201], [-INF, 0, -200]], device=device, dtype=dtype)
    bias = torch.tensor([1.0, -9, 1], device=device)
    weights, ids = ops.topk_softmax(logits, 2, True, torch.tensor([-9.0, 0, 0], device=device))
    assert ids[0].tolist() == [1, 2]
    expected = torch.tensor([0.0, -1.0], device=device).softmax(0)
    torch.testing.assert_close(weights[0], expected, rtol=1e-6, atol=0)
    weights, ids = ops.topk_softmax(logits, 2, True, bias)
    assert ids[1].tolist() == [0, 2] and weights[1].tolist() == [0, 1]


def test_select_bias_leaves_rows_that_are_no_distribution_nan(device):
    logits = torch.tensor([[NAN, 1, 2, 3], [INF, 0, 1, 2], [-INF] * 4, [0.0, 1, 2, 3]], device=device)
    weights, ids = ops.topk_softmax(logits, 3, True, torch.tensor([0.1, 0.4, 0.0, 0.2], device=device))
    assert weights[:3].isnan().all() and weights[3].isfinite().all()
    assert all(len(set(row)) == 3 for row in ids.tolist())


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.ones(1, 4), r"select_bias must have 1 dimensions \[E\], got shape \[1, 4\]"),
        (torch.ones(3), r"select_bias must have size 4 in dimension 0, got shape \[3\]"),
        (torch.ones(4).half(), "select_bias must be Float, got Half"),
    ],
)
def test_bad_select_bias_raises(bias, message, device):
    with pytest.raises(RuntimeError, match="topk_softmax: " + message):
        ops.topk_softmax(torch.ones(2, 4, device=device), 1, True, bias.to(device))
    with pytest.raises(RuntimeError, match="moe_route: " + message):
        ops.moe_route(torch.ones(2, 3, device=device), torch.ones(4, 3, device=device), 1, True, bias.to(device))


@pytest.mark.parametrize("case", [(0, 8, 2), (5, 3, 1), (33, 8, 2)], ids=str)
def test_opcheck(case, device, dtype):
    tokens, experts, top_k = case
    logits = torch.randn(tokens, experts, device=device).to(dtype).requires_grad_()
    opcheck(torch.ops.mixtral.topk_softmax.default, (logits, top_k))
    opcheck(torch.ops.mixtral.topk_softmax.default, (logits, top_k, False, torch.randn(experts, device=device)))
