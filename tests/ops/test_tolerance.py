"""The tolerance itself: every correct result is within it, and results with planted faults are not.

MIXTRAL_TOLERANCE_SEEDS sets from how many seeds the correct results come; the largest error is printed (pytest -s).
"""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mixtral.ops as ops
from conftest import assert_route_within_tolerance, near, share_of_tolerance
from error_bounds import half_ulp
from mixtral import reference
from routing import ROUTINGS, make_routing, offsets

SEEDS = int(os.environ.get("MIXTRAL_TOLERANCE_SEEDS", 3))
SIXTEEN_BITS = [torch.bfloat16, torch.float16]


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def size(largest: int) -> int:
    """At least 1; as often small as large."""
    return int(2 ** (torch.rand(()).item() * torch.tensor(largest + 0.5).log2().item()))


def routed(tokens: int, experts: int, top_k: int) -> Tensor:
    return make_routing(ROUTINGS[size(4) - 1], tokens, experts, top_k)


def gemm_arguments(dtype: torch.dtype, rows: int, depth: int, columns: int) -> tuple:
    experts = size(4)
    ids = routed(rows, experts, 1)
    return normal(rows, depth, dtype=dtype), normal(experts, columns, depth, dtype=dtype), offsets(ids, experts)


def moe_arguments(dtype: torch.dtype, tokens: int, hidden: int, intermediate: int) -> tuple:
    experts = 1 + size(7)
    return (
        normal(tokens, hidden, dtype=dtype),
        torch.rand(tokens, 2),
        routed(tokens, experts, 2),
        (normal(experts, 2 * intermediate, hidden, dtype=torch.float64) / hidden**0.5).to(dtype),
        (normal(experts, hidden, intermediate, dtype=torch.float64) / intermediate**0.5).to(dtype),
    )


def attention_arguments(dtype: torch.dtype, queries: int, keys: int, head_dim: int, window: int) -> tuple:
    q, k, v = normal(queries, 4, head_dim, dtype=dtype), *normal(2, keys, 2, head_dim, dtype=dtype)
    return q, k, v, torch.tensor([0, queries]), torch.tensor([0, keys]), window


def unpermute_arguments(dtype: torch.dtype, tokens: int, hidden: int) -> tuple:
    row_map = reference.moe_permute(torch.zeros(tokens, 1), routed(tokens, 8, 2), 8)[2]
    return normal(2 * tokens, hidden, dtype=dtype), torch.rand(tokens, 2), row_map


# Small arguments for each op: of few numbers, chance could favour one of two implementations.
ARGUMENTS: dict[str, Callable[[torch.dtype], tuple]] = {
    "rms_norm": lambda dtype: (normal(size(5), h := size(600), dtype=dtype), normal(h, dtype=dtype), 1e-5),
    "rope": lambda dtype: (
        normal(t := size(5), 2, d := 2 * size(64), dtype=dtype),
        normal(t, 1, d, dtype=dtype),
        torch.randint(0, 40000, (t,)),
        1e6,
        size(2) == 2,
    ),
    "swiglu": lambda dtype: (4 * normal(size(5), 2 * size(100), dtype=dtype),),
    "topk_softmax": lambda dtype: (3 * normal(size(5), e := size(20), dtype=dtype), size(e), size(2) == 2),
    "grouped_gemm": lambda dtype: gemm_arguments(dtype, size(40), size(600), size(40)),
    "moe_unpermute": lambda dtype: unpermute_arguments(dtype, size(10), size(60)),
    "moe_mlp": lambda dtype: moe_arguments(dtype, size(10), size(100), size(100)),
    "sliding_window_attention": lambda dtype: attention_arguments(
        dtype, n := size(20), n + size(150), size(64), size(99)
    ),
}


def route_arguments(dtype: torch.dtype, tokens: int, hidden: int, experts: int) -> tuple:
    """The router is in f32 or in ``dtype``."""
    x, router = normal(tokens, hidden, dtype=dtype), normal(experts, hidden, dtype=torch.float32) / hidden**0.5
    return x, router.to((dtype, torch.float32)[size(2) - 1]), size(experts), size(2) == 2


@pytest.mark.every_isa
@pytest.mark.parametrize("op", ARGUMENTS)
def test_correct_results_are_within_the_tolerance(op, dtype):
    largest = (0.0, 0)
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        arguments = ARGUMENTS[op](dtype)
        largest = max(largest, (share_of_tolerance(op, getattr(ops, op)(*arguments), *arguments), seed))
    print(f"{op} {dtype}: largest error {largest[0]:.4f} of the tolerance, seed {largest[1]}, of {SEEDS}")
    assert largest[0] <= 1, f"seed {largest[1]}: error {largest[0]:.3g} times what is allowed"


@pytest.mark.every_isa
def test_correct_routes_are_within_the_tolerance(dtype):
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        arguments = route_arguments(dtype, size(20), size(600), size(20))
        assert_route_within_tolerance(ops.moe_route(*arguments), *arguments)


# ---- planted faults --------------------------------------------------------------------------------------------------


def truncate(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The neighbour towards zero, where another one is nearest."""
    nearest = exact.to(dtype)
    return torch.where(nearest.double().abs() > exact.abs(), (nearest.view(torch.int16) - 1).view(dtype), nearest)


def round_twice(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """First to three bits more than ``dtype`` has."""
    spacing = half_ulp(exact, dtype) / 4
    return ((exact / spacing).round() * spacing).to(dtype)


def sum_in_16_bits(a: Tensor, b: Tensor) -> Tensor:
    """a [M,Kdim] times b [N,Kdim], every partial sum rounded to their dtype, or to bf16."""
    dtype = torch.bfloat16 if a.dtype == torch.float32 else a.dtype
    total = torch.zeros(len(a), len(b), dtype=dtype)
    for k in range(a.shape[1]):
        total = (total.float() + a[:, k, None].float() * b[:, k].float()).to(dtype)
    return total.to(a.dtype)


def without_last_depth(a: Tensor) -> Tensor:
    return torch.cat((a[..., :-1], torch.zeros_like(a[..., -1:])), -1)


def wide(arguments: tuple) -> tuple:
    return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments)


def assert_caught(op: str, wrong: Tensor | tuple[Tensor, ...], *arguments) -> None:
    assert share_of_tolerance(op, getattr(ops, op)(*arguments), *arguments) <= 1
    assert share_of_tolerance(op, wrong, *arguments) > 1


@pytest.mark.every_isa
@pytest.mark.parametrize(("rows", "depth", "columns"), [(5, 16, 33), (65, 513, 31), (100, 4096, 24), (100, 14336, 24)])
def test_dropped_term_of_a_product_is_caught(rows, depth, columns, dtype):
    a, b, offs = gemm_arguments(dtype, rows, depth, columns)
    assert_caught("grouped_gemm", ops.grouped_gemm(without_last_depth(a), b, offs), a, b, offs)


@pytest.mark.parametrize("depth", [16, 513, 4096])
def test_sums_of_16_bits_are_caught(depth, dtype):
    a, b, offs = normal(30, depth, dtype=dtype), normal(1, 24, depth, dtype=dtype), torch.tensor([30])
    assert_caught("grouped_gemm", sum_in_16_bits(a, b[0]), a, b, offs)


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("fault", [truncate, round_twice])
@pytest.mark.parametrize("op", ["grouped_gemm", "rope", "swiglu", "moe_unpermute"])
def test_wrong_rounding_is_caught(op, fault, dtype):
    arguments = {
        "grouped_gemm": lambda: gemm_arguments(dtype, 130, 128, 64),
        "rope": lambda: (*(normal(33, 2, 64, dtype=dtype) for _ in "qk"), torch.arange(33), 1e6),
        "swiglu": lambda: (4 * normal(33, 512, dtype=dtype),),
        "moe_unpermute": lambda: unpermute_arguments(dtype, 65, 100),
    }[op]()
    exact = getattr(reference, op)(*wide(arguments))
    wrong = tuple(fault(x, dtype) for x in exact) if isinstance(exact, tuple) else fault(exact, dtype)
    assert_caught(op, wrong, *arguments)


@pytest.mark.every_isa
@pytest.mark.parametrize("hidden", [100, 4096])
def test_faults_of_a_norm_are_caught(hidden, dtype):
    x, weight = normal(33, hidden, dtype=dtype), normal(hidden, dtype=dtype)
    mean = (without_last_depth(x).double().square().mean(-1, keepdim=True) + 1e-5).sqrt()  # without the last square
    assert_caught("rms_norm", ((x.double() / mean).to(dtype).double() * weight.double()).to(dtype), x, weight, 1e-5)
    if dtype != torch.float32:
        normed = truncate(reference.rms_norm(x.double(), torch.ones(hidden).double(), 1e-5), dtype)
        assert_caught("rms_norm", normed * weight, x, weight, 1e-5)


def test_faults_of_a_softmax_are_caught(dtype):
    logits = 3 * normal(33, 8, dtype=dtype)
    weights, ids = ops.topk_softmax(logits, 2)
    assert_caught("topk_softmax", (weights.half().float(), ids), logits, 2)
    almost = (0.99999 * logits.float()).softmax(-1).gather(1, ids.long())
    assert_caught("topk_softmax", (almost, ids), logits, 2, False)


@pytest.mark.every_isa
@pytest.mark.parametrize("hidden", [16, 513, 4096])
def test_faults_of_a_router_are_caught(hidden, dtype):
    x, router = normal(33, hidden, dtype=dtype), normal(8, hidden, dtype=torch.float32) / hidden**0.5
    assert assert_route_within_tolerance(ops.moe_route(x, router, 2), x, router, 2).all()
    for wrong in (
        ops.moe_route(without_last_depth(x), router, 2),
        ops.topk_softmax(sum_in_16_bits(x.to(SIXTEEN_BITS[0]), router.to(SIXTEEN_BITS[0])), 2),
        ops.moe_route(x, router, 2, False),
    ):
        with pytest.raises(AssertionError):
            assert_route_within_tolerance(wrong, x, router, 2)


@pytest.mark.every_isa
def test_faults_of_an_expert_layer_are_caught(dtype):
    x, weights, ids, gate_up, down = arguments = moe_arguments(dtype, 65, 64, 96)
    for wrong in (
        ops.moe_mlp(without_last_depth(x), *arguments[1:]),
        ops.moe_mlp(*arguments[:4], without_last_depth(down)),
        ops.moe_mlp(x, weights.roll(1, 0), *arguments[2:]),
        ops.moe_mlp(x, weights, ids, gate_up.roll(1, 1), down),
    ):
        assert_caught("moe_mlp", wrong, *arguments)


@pytest.mark.every_isa
def test_faults_of_attention_are_caught(dtype):
    q, k, v, cu_q, cu_k, window = arguments = attention_arguments(dtype, 50, 120, 64, 40)
    for wrong in (
        ops.sliding_window_attention(q, k, v, cu_q, cu_k, window - 1),
        ops.sliding_window_attention(q, k, v, cu_q, cu_k, window + 1),
        ops.sliding_window_attention(without_last_depth(q), k, v, cu_q, cu_k, window),
        ops.sliding_window_attention(q, k, v, cu_q, cu_k, window, scale=0.13),
    ):
        assert_caught("sliding_window_attention", wrong, *arguments)
    if dtype == torch.float16:  # with bf16, a rounding of every weight is allowed
        exact = reference.sliding_window_attention(*wide(arguments))
        assert_caught("sliding_window_attention", truncate(exact, dtype), *arguments)


def test_near_takes_another_rounding_and_no_wrong_value():
    """What Hopper kernels are held to where another one computed the same product."""
    right = torch.randn(64, 128)
    other = torch.where(torch.rand_like(right) < 0.5, right * (1 + 2**-8), right)  # every second one rounded up
    assert near(other, right, 2**-7)
    for wrong in (right.roll(1, 0), right.masked_fill(right == right[3, 7], 2.0), right * (1 + 2**-6)):
        assert not near(wrong, right, 2**-7)
    for value in (torch.nan, torch.inf):
        assert not near(right.masked_fill(right == right[3, 7], value), right, 2**-7)
