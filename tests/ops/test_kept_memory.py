"""Threads keep memory from call to call. What an earlier call left there, even NaN, never reaches a result.

The kernels work in steps of 32 depths: where a size is no multiple of it, they add zeros, without which NaN would show.
"""

import pytest
import torch

import mixtral.ops as ops
from conftest import assert_within_tolerance, with_threads
from routing import make_routing, offsets

NAN = float("nan")
DEPTHS = [1, 7, 31, 33, 63, 65, 255, 257, 500, 513, 1040]


def fill_with_nan(rows: int, depth: int, dtype: torch.dtype) -> None:
    """Every buffer of the products of up to ``rows`` rows and ``depth`` depths, for the one thread of the tests."""
    depth = -(-depth // 32) * 32
    a, b = torch.full((max(rows, 64), depth), NAN).to(dtype), torch.full((1, 64, depth), NAN).to(dtype)
    for count in (rows, len(a)):
        out = ops.grouped_gemm(a[:count], b, torch.tensor([count]))
        assert out.isnan().all()


@pytest.mark.every_isa
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("rows", [1, 5, 33, 130])
def test_grouped_gemm(rows, depth, dtype):
    a, b = torch.randn(rows, depth).to(dtype), torch.randn(3, 37, depth).to(dtype)
    offs = offsets(make_routing("uniform", rows, 3, 1), 3)

    def call() -> torch.Tensor:
        fill_with_nan(rows, depth, dtype)
        return ops.grouped_gemm(a, b, offs)

    assert_within_tolerance("grouped_gemm", with_threads(1, call), a, b, offs)


@pytest.mark.every_isa
@pytest.mark.parametrize("sizes", [(33, 31), (65, 100), (257, 7)], ids=str)
def test_moe_mlp(sizes, dtype):
    hidden, intermediate = sizes
    x, ids, weights = torch.randn(40, hidden).to(dtype), make_routing("zipf", 40, 3, 2), torch.rand(40, 2)
    gate_up = (torch.randn(3, 2 * intermediate, hidden) / hidden**0.5).to(dtype)
    down = (torch.randn(3, hidden, intermediate) / intermediate**0.5).to(dtype)
    layer = (x, weights, ids, gate_up, down)

    def call() -> torch.Tensor:
        assert ops.moe_mlp(torch.full_like(x, NAN), *layer[1:]).isnan().all()
        fill_with_nan(80, max(sizes), dtype)
        return ops.moe_mlp(*layer)

    assert_within_tolerance("moe_mlp", with_threads(1, call), *layer)


@pytest.mark.every_isa
@pytest.mark.parametrize("head_dim", [1, 7, 33, 65, 100])
def test_attention(head_dim, dtype):
    def make(head_dim: int, queries: int, keys: int) -> tuple:
        q, k, v = torch.randn(queries, 4, head_dim), *torch.randn(2, keys, 2, head_dim)
        return q.to(dtype), k.to(dtype), v.to(dtype), torch.tensor([0, queries]), torch.tensor([0, keys]), 30

    arguments, larger = make(head_dim, 20, 75), make(-(-head_dim // 32) * 32, 64, 128)

    def call() -> torch.Tensor:
        poison = [torch.full_like(x, NAN) for x in larger[:3]]
        assert ops.sliding_window_attention(*poison, *larger[3:]).isnan().all()
        return ops.sliding_window_attention(*arguments)

    assert_within_tolerance("sliding_window_attention", with_threads(1, call), *arguments)


@pytest.mark.every_isa
def test_moe_route(dtype):
    x, router = torch.randn(50, 33).to(dtype), torch.randn(5, 33)
    expected = [part.clone() for part in ops.moe_route(x, router, 2)]

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        assert ops.moe_route(torch.full((60, 48), NAN).to(dtype), torch.randn(9, 48), 2)[0].isnan().all()
        return ops.moe_route(x, router, 2)

    assert all(torch.equal(actual, want) for actual, want in zip(with_threads(1, call), expected, strict=True))
