"""moe_route against the f64 reference and, where its logits are exact, bit for bit against topk_softmax."""

import pytest
import torch

import mixtral.ops as ops
from conftest import assert_route_within_tolerance, assert_within_bound, opcheck, with_threads
from error_bounds import route_logits_bound

# T, H, E, K
CASES = [(0, 8, 4, 2), (1, 1, 1, 1), (3, 5, 2, 1), (7, 33, 3, 3), (65, 128, 8, 2), (33, 260, 17, 4), (1029, 64, 8, 2)]
ROUTERS = ["float32", "model"]


def make(case: tuple, router_dtype: str, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, hidden, experts, _ = case
    x = torch.randn(tokens, hidden, device=device).to(dtype)
    router = torch.randn(experts, hidden, device=device) / hidden**0.5
    return x, router.to(dtype if router_dtype == "model" else torch.float32)


@pytest.mark.parametrize("router_dtype", ROUTERS)
@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalize", "plain"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case, renormalize, router_dtype, device, dtype):
    x, router = make(case, router_dtype, device, dtype)
    weights, ids = ops.moe_route(x, router, case[3], renormalize)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    decided = assert_route_within_tolerance((weights, ids), x, router, case[3], renormalize)
    assert len(x) == 0 or decided.double().mean() >= (1 if router.dtype == torch.float32 else 0.5)


@pytest.mark.every_isa
@pytest.mark.parametrize("router_dtype", ROUTERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_topk_softmax_of_exact_logits(case, router_dtype, dtype):
    """Sums of small multiples of 1/64 are exact in any order: only the rounding to the router's dtype is left."""
    tokens, hidden, experts, top_k = case
    x = torch.randint(-8, 9, (tokens, hidden)).to(dtype)
    router = (torch.randint(-8, 9, (experts, hidden)) / 64).to(dtype if router_dtype == "model" else torch.float32)
    logits = (x.double() @ router.double().T).to(router.dtype)
    expected = ops.topk_softmax(logits, top_k)
    for actual, want in zip(ops.moe_route(x, router, top_k), expected, strict=True):
        assert torch.equal(actual, want)


def test_strided_input(device, dtype):
    x, router = make((9, 34, 5, 2), "float32", device, dtype)
    for view in (x[:, ::2], x[1:, 1:18], x[:1, :17].expand(4, -1)):
        expected = ops.moe_route(view.contiguous(), router[:, ::2].contiguous(), 2)
        for actual, want in zip(ops.moe_route(view, router[:, ::2], 2), expected, strict=True):
            assert torch.equal(actual, want)


@pytest.mark.every_isa
@pytest.mark.parametrize("experts", [8, 17])
def test_row_does_not_depend_on_batch_or_threads(experts, device, dtype):
    x, router = make((2051, 260, experts, 2), "float32", device, dtype)
    weights, ids = with_threads(2, lambda: ops.moe_route(x, router, 2))
    assert torch.equal(weights, with_threads(1, lambda: ops.moe_route(x, router, 2)[0]))
    for begin, end in ((0, 1), (0, 2), (1025, 1026), (1023, 1028), (40, 140), (2050, 2051)):
        part = ops.moe_route(x[begin:end], router, 2)
        assert torch.equal(weights[begin:end], part[0]) and torch.equal(ids[begin:end], part[1])


def test_nan_stays_in_its_row(device, dtype):
    x, router = make((5, 40, 8, 2), "float32", device, dtype)
    clean_weights, clean_ids = ops.moe_route(x, router, 2)
    x[1, 3] = float("nan")
    weights, ids = ops.moe_route(x, router, 2)
    assert weights[1].isnan().all() and 0 <= ids[1].min() and ids[1].max() < 8
    rest = [0, 2, 3, 4]
    assert torch.equal(weights[rest], clean_weights[rest]) and torch.equal(ids[rest], clean_ids[rest])


@pytest.mark.parametrize(
    ("x", "router", "top_k", "message"),
    [
        (torch.ones(4), torch.ones(2, 4), 1, r"moe_route: x must have 2 dimensions \[T, H\], got shape \[4\]"),
        (torch.ones(3, 4).int(), torch.ones(2, 4), 1, "moe_route: x must be Float, BFloat16 or Half, got Int"),
        (torch.ones(3, 4), torch.ones(4), 1, r"moe_route: router must have 2 dimensions \[E, H\], got shape \[4\]"),
        (torch.ones(3, 4), torch.ones(2, 5), 1, "moe_route: router must have size 4 in dimension 1, got"),
        (torch.ones(3, 4), torch.ones(2, 4).half(), 1, "moe_route: router must be Float or have the dtype of x"),
        (torch.ones(3, 4), torch.ones(2, 4), 0, r"moe_route: top_k must be in \[1, 2\], got 0"),
        (torch.ones(3, 4), torch.ones(2, 4), 3, r"moe_route: top_k must be in \[1, 2\], got 3"),
        (torch.ones(3, 4), torch.ones(0, 4), 1, r"moe_route: top_k must be in \[1, 0\], got 1"),
    ],
)
def test_bad_input_raises(x, router, top_k, message, device):
    with pytest.raises(RuntimeError, match=message):
        ops.moe_route(x.to(device), router.to(device), top_k)


@pytest.mark.every_isa
@pytest.mark.parametrize("router_dtype", ROUTERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_topk_softmax_of_router_logits_bit_for_bit(case, router_dtype, device, dtype):
    x, router = make(case, router_dtype, device, dtype)
    logits = ops.router_logits(x, router)
    assert logits.dtype == torch.float32
    assert_within_bound(logits, x.double() @ router.double().T, route_logits_bound(x, router))
    for options in ((True, None), (False, None), (True, torch.rand(len(router), device=device))):
        expected = ops.topk_softmax(logits, case[3], *options)
        for actual, want in zip(ops.moe_route(x, router, case[3], *options), expected, strict=True):
            assert torch.equal(actual, want)


def test_router_logits_of_no_experts(device):
    assert ops.router_logits(torch.ones(3, 4, device=device), torch.ones(0, 4, device=device)).shape == (3, 0)


def test_selective_precision_of_ten_logits_of_128_and_one_of_128_5(device):
    """ST-MoE (2022), footnote 7: bf16 rounds 128.5 to 128, so that .1415 becomes .0909."""
    x = torch.full((1, 2), 0.5, device=device, dtype=torch.bfloat16)
    x[0, 0] = 128
    router = torch.tensor([[1.0, 0.0]] * 10 + [[1.0, 1.0]], device=device)  # exact in bf16, as are its products
    for of_dtype, share in ((router, 0.1415), (router.bfloat16(), 0.0909)):
        weights, ids = ops.moe_route(x, of_dtype, 11, renormalize=False)
        assert weights[0, (ids[0] == 10).nonzero().item()].item() == pytest.approx(share, abs=5e-5)


def test_rounding_the_logits_changes_the_choice_of_few_tokens():
    """Of random tokens and a router of standard deviation .02: docs/numerics.md quotes this."""
    x, router = torch.randn(4096, 4096, dtype=torch.bfloat16), (torch.randn(8, 4096) * 0.02).bfloat16()
    rounded, selective = (ops.moe_route(x, r, 2)[1].sort(-1).values for r in (router, router.float()))
    share = (rounded != selective).any(-1).double().mean().item()
    print(f"{100 * share:.2f} % of tokens choose another pair")
    assert 0.0005 < share < 0.005


@pytest.mark.parametrize("router_dtype", ROUTERS)
@pytest.mark.parametrize("case", [(0, 8, 4, 2), (5, 12, 3, 1)], ids=str)
def test_opcheck(case, router_dtype, device, dtype):
    x, router = make(case, router_dtype, device, dtype)
    leaves = x.requires_grad_(), router.requires_grad_()
    opcheck(torch.ops.mixtral.moe_route.default, (*leaves, case[3]))
    opcheck(torch.ops.mixtral.router_logits.default, leaves)
