"""Random shapes, routings and masks against the f64 reference: each case follows from its seed, which a failure names.

MIXTRAL_RANDOM_CASES sets how many cases each op gets (scripts/gpu_check.sh: hundreds). Outputs start as NaN.
"""

import os
import random
from collections.abc import Callable

import pytest
import torch

import mixtral.ops as ops
from conftest import (
    DTYPES,
    assert_route_within_tolerance,
    assert_same_product,
    assert_within_tolerance,
    pack,
)
from mixtral import reference
from routing import ROUTINGS, make_routing

CASES = int(os.environ.get("MIXTRAL_RANDOM_CASES", 30))
TOKENS = [0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 257]


@pytest.fixture(autouse=True)
def nan_filled_outputs():
    """torch fills what an op allocates with NaN: a value that no kernel writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class Case:
    """Random choices of one seed; every second case has the shapes that fast kernels ask for."""

    def __init__(self, seed: int, device: str):
        self.choose, self.device = random.Random(seed), device
        torch.manual_seed(seed)
        self.aligned = seed % 2 == 0
        self.dtype = torch.bfloat16 if self.aligned else self.choose.choice(DTYPES)

    def size(self, largest: int = 160) -> int:
        return 8 * self.choose.randint(1, largest // 4) if self.aligned else self.choose.randint(1, largest)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.float64).to(self.dtype)

    def routing(self) -> tuple[int, int, int, torch.Tensor]:
        """T, E, K, topk_ids."""
        tokens, experts = self.choose.choice(TOKENS), self.choose.choice([1, 2, 3, 4, 8, 16])
        top_k = self.choose.choice([1, min(2, experts), min(4, experts)])
        return tokens, experts, top_k, make_routing(self.choose.choice(ROUTINGS), tokens, experts, top_k, self.device)


def each_case(device: str, check: Callable[[Case], None]) -> None:
    for seed in range(CASES):
        try:
            check(Case(seed, device))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def test_grouped_gemm(device):
    def check(case: Case) -> None:
        tokens, experts, top_k, ids = case.routing()
        a, b = case.normal(tokens * top_k, case.size()), None
        b = case.normal(experts, case.size(), a.shape[1])
        offs = ids.flatten().long().bincount(minlength=experts).cumsum(0)
        assert_within_tolerance("grouped_gemm", ops.grouped_gemm(a, b, offs), a, b, offs)

    each_case(device, check)


def test_moe_mlp(device):
    def check(case: Case) -> None:
        tokens, experts, top_k, ids = case.routing()
        hidden, intermediate = case.size(), case.size()
        layer = (
            case.normal(tokens, hidden),
            torch.rand(tokens, top_k, device=device),
            ids,
            case.normal(experts, 2 * intermediate, hidden) / hidden**0.5,
            case.normal(experts, hidden, intermediate) / intermediate**0.5,
        )
        assert_within_tolerance("moe_mlp", ops.moe_mlp(*layer), *layer)

    each_case(device, check)


def test_fp8_weights(device):
    """A product is that of what rows and weights are rounded to; the layer is its steps."""

    def check(case: Case) -> None:
        tokens, experts, top_k, ids = case.routing()
        hidden, intermediate = 32 * case.choose.randint(1, 6), 32 * case.choose.randint(1, 6)
        x, weights = case.normal(tokens, hidden).bfloat16(), torch.rand(tokens, top_k, device=device)
        gate_up = pack(case.normal(experts, 2 * intermediate, hidden).bfloat16(), "fp8")
        down = pack(case.normal(experts, hidden, intermediate).bfloat16(), "fp8")
        permuted, offs, row_map = ops.moe_permute(x, ids, experts)
        product = ops.grouped_gemm(permuted, gate_up, offs)
        rows = reference.round_rows_to_e4m3(permuted)
        assert_same_product(product, ops.grouped_gemm(rows, ops.unpack_weight(gate_up), offs), float8=True)
        y = ops.grouped_gemm(ops.swiglu(product), down, offs)
        layer = ops.moe_mlp(x, weights, ids, gate_up, down)
        assert_same_product(layer, ops.moe_unpermute(y, weights, row_map), float8=True)

    each_case(device, check)


def test_moe_permute_and_unpermute(device):
    def check(case: Case) -> None:
        tokens, experts, top_k, ids = case.routing()
        x = case.normal(tokens, case.size())
        permuted, offs, row_map = ops.moe_permute(x, ids, experts)
        for actual, want in zip((permuted, offs, row_map), reference.moe_permute(x, ids, experts), strict=True):
            assert torch.equal(actual, want)
        weights = torch.rand(tokens, top_k, device=device)
        out = ops.moe_unpermute(permuted, weights, row_map)
        assert_within_tolerance("moe_unpermute", out, permuted, weights, row_map)

    each_case(device, check)


def test_moe_route(device):
    def check(case: Case) -> None:
        tokens, experts, top_k, _ = case.routing()
        x, router = case.normal(tokens, case.size()), None
        router = torch.randn(experts, x.shape[1], device=device) / x.shape[1] ** 0.5
        decided = assert_route_within_tolerance(ops.moe_route(x, router, top_k), x, router, top_k)
        assert (~decided).sum() <= 1

    each_case(device, check)


def lengths(case: Case, sequences: int, largest: int) -> list[int]:
    return [case.choose.choice([0, 1, case.choose.randint(1, largest)]) for _ in range(sequences)]


def starts(counts: list[int], device: str) -> torch.Tensor:
    return torch.tensor([0, *counts], device=device).cumsum(0)


def heads(case: Case) -> tuple[int, int, int]:
    """Nq, Nkv, D."""
    kv_heads = case.choose.choice([1, 2, 4])
    head_dim = 128 if case.aligned else case.choose.choice([16, 33, 64, 128])
    return kv_heads * case.choose.choice([1, 2, 4]), kv_heads, head_dim


def test_sliding_window_attention(device):
    def check(case: Case) -> None:
        num_heads, kv_heads, head_dim = heads(case)
        queries = lengths(case, case.choose.randint(0, 4), 300)
        causal = case.choose.random() < 0.8
        keys = [n + case.choose.choice([0, 0, 5, 140]) if causal else case.choose.randint(0, 300) for n in queries]
        q = case.normal(sum(queries), num_heads, head_dim)
        k, v = case.normal(sum(keys), kv_heads, head_dim), case.normal(sum(keys), kv_heads, head_dim)
        window = case.choose.choice([0, 1, 16, 100, 129]) if causal else 0
        options = (starts(queries, device), starts(keys, device), window, causal)
        out = ops.sliding_window_attention(q, k, v, *options)
        assert_within_tolerance("sliding_window_attention", out, q, k, v, *options)

    each_case(device, check)


def test_rolling_kv_cache_attention(device):
    def check(case: Case) -> None:
        num_heads, kv_heads, head_dim = heads(case)
        page_size = case.choose.choice([16, 16, 32, 3])
        window = case.choose.choice([0, 7, 64, 130])
        decode = case.choose.random() < 0.5
        counts = [1] * case.choose.randint(1, 5) if decode else lengths(case, case.choose.randint(1, 3), 200)
        kv_lens = [n + case.choose.choice([0, 3, 150, 400]) for n in counts]
        # Stale and unwritten slots hold NaN; only what a query may see is written.
        first = [max(0, n - c - window + 1) if window else 0 for n, c in zip(kv_lens, counts, strict=True)]
        columns = max(-(-n // page_size) - f // page_size for n, f in zip(kv_lens, first, strict=True)) + 1
        pages = len(counts) * columns + 2
        k_cache, v_cache = torch.full(
            (2, pages, page_size, kv_heads, head_dim), float("nan"), device=device, dtype=case.dtype
        )
        free = case.choose.sample(range(pages), pages)
        page_table = torch.full((len(counts), columns), -1, device=device)
        for b, length in enumerate(kv_lens):
            for number in range(first[b] // page_size, -(-length // page_size)):
                page_table[b, number % columns] = page = free.pop()
                begin = max(first[b] - number * page_size, 0)
                end = min(length - number * page_size, page_size)
                k_cache[page, begin:end] = case.normal(end - begin, kv_heads, head_dim)
                v_cache[page, begin:end] = case.normal(end - begin, kv_heads, head_dim)
        q = case.normal(sum(counts), num_heads, head_dim)
        index = (page_table, starts(counts, device), torch.tensor(kv_lens, device=device), window)
        out = ops.rolling_kv_cache_attention(q, k_cache, v_cache, *index)
        assert_within_tolerance("rolling_kv_cache_attention", out, q, k_cache, v_cache, *index)

    each_case(device, check)
