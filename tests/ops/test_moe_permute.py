"""moe_permute and moe_unpermute: the stable order, the way back, bad ids, invariances and errors."""

import pytest
import torch

import mixtral.ops as ops
from conftest import assert_within_tolerance, opcheck, with_threads
from mixtral import reference
from routing import ROUTINGS, make_routing

# T, H, E, K
CASES = [(0, 8, 4, 2), (1, 1, 1, 1), (3, 5, 2, 2), (7, 33, 3, 1), (65, 64, 8, 2), (129, 100, 16, 4)]


@pytest.mark.every_isa
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_permute_matches_reference(case, routing, device, dtype):
    tokens, hidden, experts, top_k = case
    x = torch.randn(tokens, hidden, device=device).to(dtype)
    ids = make_routing(routing, tokens, experts, top_k, device)
    for topk_ids in (ids, ids.long()):
        expected = reference.moe_permute(x, topk_ids, experts)
        for actual, want in zip(ops.moe_permute(x, topk_ids, experts), expected, strict=True):
            assert actual.dtype == want.dtype and torch.equal(actual, want)


def test_permute_of_many_copies_is_stable(device):
    """More copies than one chunk of the CUDA sort holds; the rows carry their token's number."""
    tokens, experts, top_k = 40_000, 5, 3
    x = torch.arange(tokens, device=device, dtype=torch.float32)[:, None]
    ids = make_routing("zipf", tokens, experts, top_k, device)
    permuted, offs, row_map = ops.moe_permute(x, ids, experts)
    assert torch.equal(permuted[row_map.long()][..., 0], x.expand(-1, top_k))
    start = 0
    for e, end in enumerate(offs.tolist()):
        assert end - start == int((ids == e).sum())
        assert (permuted[start:end].diff(dim=0) >= 0).all()
        start = end
    assert start == tokens * top_k


@pytest.mark.every_isa
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_unpermute_matches_reference(case, routing, device, dtype):
    tokens, hidden, experts, top_k = case
    ids = make_routing(routing, tokens, experts, top_k, device)
    y = torch.randn(tokens * top_k, hidden, device=device, dtype=torch.float64).to(dtype)
    weights = torch.rand(tokens, top_k, device=device)
    row_map = reference.moe_permute(y[:tokens], ids, experts)[2]
    for index in (row_map, row_map.long()):
        assert_within_tolerance("moe_unpermute", ops.moe_unpermute(y, weights, index), y, weights, row_map)


def test_unpermute_undoes_permute(device, dtype):
    x = torch.randn(33, 20, device=device).to(dtype)
    for top_k in (1, 2, 4):  # weights and sums are exact
        permuted, _, row_map = ops.moe_permute(x, make_routing("uniform", 33, 8, top_k, device), 8)
        weights = torch.full((33, top_k), 1 / top_k, device=device)
        assert torch.equal(ops.moe_unpermute(permuted, weights, row_map), x)


def test_unpermute_adds_in_the_order_of_k(device):
    y = torch.tensor([[1e8], [1.0], [-1e8]], device=device)
    weights = torch.ones(1, 3, device=device)
    for row_map, expected in (([[0, 1, 2]], 0.0), ([[0, 2, 1]], 1.0)):
        assert ops.moe_unpermute(y, weights, torch.tensor(row_map, device=device)).item() == expected


def test_unpermute_skips_dropped_copies(device, dtype):
    y = torch.randn(4, 20, device=device).to(dtype)
    y[0] = float("nan")
    weights = torch.ones(2, 2, device=device)
    out = ops.moe_unpermute(y, weights, torch.tensor([[-1, 2], [-1, -1]], device=device))
    assert torch.equal(out, torch.stack([y[2], torch.zeros_like(y[2])]))


def test_a_copy_without_an_expert_is_dropped(device, dtype):
    x = torch.randn(5, 6, device=device).to(dtype)
    ids = torch.tensor([[0, 1], [-1, 2], [3, -1], [-1, -1], [2, 0]], device=device)
    expected = reference.moe_permute(x, ids, 4)
    assert expected[1].tolist() == [2, 3, 5, 6] and expected[2].tolist() == [[0, 2], [-1, 3], [5, -1], [-1, -1], [4, 1]]
    for topk_ids in (ids, ids.int()):
        for actual, want in zip(ops.moe_permute(x, topk_ids, 4), expected, strict=True):
            assert torch.equal(actual, want)
    none = torch.full_like(ids, -1)
    assert not ops.moe_permute(x, none, 4)[0].any()


@pytest.mark.parametrize("bad", [-2, 4, 2**31 - 1, -(2**31), 2**32 + 1, -(2**63)])
def test_bad_id_is_an_error_on_cpu_and_dropped_on_cuda(bad, device):
    x = torch.randn(3, 5, device=device)
    ids = torch.tensor([[0, 1], [bad, 2], [3, 0]], device=device)
    if device == "cpu":
        expected = rf"moe_permute: topk_ids must be in \[0, 4\), or -1 for none, got {bad} at token 1"
        with pytest.raises(RuntimeError, match=expected):
            ops.moe_permute(x, ids, 4)
        return
    permuted, offs, row_map = ops.moe_permute(x, ids, 4)
    assert offs.tolist() == [2, 3, 4, 5] and row_map.tolist() == [[0, 2], [-1, 3], [4, 1]]
    assert torch.equal(permuted, torch.stack([x[0], x[2], x[0], x[1], x[2], torch.zeros_like(x[0])]))


def test_bad_row_is_an_error_on_cpu_and_skipped_on_cuda(device):
    y, weights = torch.ones(2, 3, device=device), torch.ones(1, 2, device=device)
    for bad in (2, -2, 2**32):
        row_map = torch.tensor([[1, bad]], device=device)
        if device == "cpu":
            message = rf"moe_unpermute: row_map must be in \[-1, 2\), got {bad} at token 0"
            with pytest.raises(RuntimeError, match=message):
                ops.moe_unpermute(y, weights, row_map)
        else:
            assert torch.equal(ops.moe_unpermute(y, weights, row_map), y[:1])


def test_strided_inputs(device, dtype):
    wide = torch.randn(8, 40, device=device).to(dtype)
    ids = make_routing("uniform", 8, 4, 4, device)
    cases = ((wide[:, 1::2], ids[:, ::2]), (wide[:1].expand(8, -1), ids.T[:2].T), (wide[:, 1:9], ids[:, 1:3]))
    for x, topk_ids in cases:
        expected = ops.moe_permute(x.contiguous(), topk_ids.contiguous(), 4)
        permuted, _, row_map = actual = ops.moe_permute(x, topk_ids, 4)
        for got, want in zip(actual, expected, strict=True):
            assert torch.equal(got, want)
        weights = torch.rand(2, 8, device=device).T
        want = ops.moe_unpermute(permuted, weights.contiguous(), row_map)
        assert torch.equal(ops.moe_unpermute(permuted.T.contiguous().T, weights, row_map), want)


def test_does_not_depend_on_batch_or_threads(device, dtype):
    x, ids = torch.randn(129, 500, device=device).to(dtype), make_routing("uniform", 129, 8, 2, device)
    weights = torch.rand(129, 2, device=device)

    def run(part: slice) -> torch.Tensor:
        permuted, _, row_map = ops.moe_permute(x[part], ids[part], 8)
        return ops.moe_unpermute(permuted, weights[part], row_map)

    whole = with_threads(2, lambda: run(slice(None)))
    assert torch.equal(whole, with_threads(1, lambda: run(slice(None))))
    for t in (0, 64, 128):
        assert torch.equal(whole[t : t + 1], run(slice(t, t + 1)))


@pytest.mark.parametrize(
    ("x", "ids", "experts", "message"),
    [
        (torch.ones(2), torch.zeros(2, 1).int(), 4, r"moe_permute: x must have 2 dimensions \[T, H\], got shape \[2\]"),
        (torch.ones(2, 4).long(), torch.zeros(2, 1).int(), 4, "moe_permute: x must be Float, BFloat16 or Half"),
        (torch.ones(2, 4), torch.zeros(2).int(), 4, r"topk_ids must have 2 dimensions \[T, K\], got shape \[2\]"),
        (torch.ones(2, 4), torch.zeros(2, 1), 4, "moe_permute: topk_ids must be Int or Long, got Float"),
        (torch.ones(2, 4), torch.zeros(3, 1).int(), 4, r"topk_ids must have size 2 in dimension 0, got shape \[3, 1\]"),
        (torch.ones(2, 4), torch.zeros(2, 1).int(), 0, "moe_permute: num_experts must be >= 1, got 0"),
    ],
)
def test_permute_bad_input_raises(x, ids, experts, message, device):
    with pytest.raises(RuntimeError, match=message):
        ops.moe_permute(x.to(device), ids.to(device), experts)


Y, W, MAP = torch.ones(4, 3), torch.ones(2, 2), torch.zeros(2, 2).int()


@pytest.mark.parametrize(
    ("y", "weights", "row_map", "message"),
    [
        (Y[0], W, MAP, r"moe_unpermute: y must have 2 dimensions \[M, H\], got shape \[3\]"),
        (Y.double(), W, MAP, "moe_unpermute: y must be Float, BFloat16 or Half, got Double"),
        (Y[:3], W, MAP, r"moe_unpermute: y must have size 4 in dimension 0, got shape \[3, 3\]"),
        (Y, W, MAP[0], r"moe_unpermute: row_map must have 2 dimensions \[T, K\], got shape \[2\]"),
        (Y, W, MAP.float(), "moe_unpermute: row_map must be Int or Long, got Float"),
        (Y, W[0], MAP, r"moe_unpermute: topk_weights must have 2 dimensions \[T, K\], got shape \[2\]"),
        (Y, W.half(), MAP, "moe_unpermute: topk_weights must be Float, got Half"),
        (Y, W[:1], MAP, r"moe_unpermute: topk_weights must have size 2 in dimension 0, got shape \[1, 2\]"),
        (Y, W[:, :1], MAP, r"moe_unpermute: topk_weights must have size 2 in dimension 1, got shape \[2, 1\]"),
    ],
)
def test_unpermute_bad_input_raises(y, weights, row_map, message, device):
    with pytest.raises(RuntimeError, match=message):
        ops.moe_unpermute(y.to(device), weights.to(device), row_map.to(device))


@pytest.mark.parametrize("case", [(0, 8, 4, 2), (7, 33, 3, 1), (9, 16, 8, 2)], ids=str)
def test_opcheck(case, device, dtype):
    tokens, hidden, experts, top_k = case
    x = torch.randn(tokens, hidden, device=device).to(dtype)
    ids = make_routing("uniform", tokens, experts, top_k, device)
    opcheck(torch.ops.mixtral.moe_permute.default, (x.requires_grad_(), ids, experts))
    permuted, _, row_map = ops.moe_permute(x.detach(), ids, experts)
    weights = torch.rand(tokens, top_k, device=device)
    opcheck(torch.ops.mixtral.moe_unpermute.default, (permuted.requires_grad_(), weights.requires_grad_(), row_map))
