"""sliding_window_attention against scaled_dot_product_attention, with and without a window, prefill and decode.

On CUDA against compiled flex_attention as well, where Triton is installed: it skips what a window hides. Useful
arithmetic counts: the query-key pairs in sight. Forward that is two products, backward five.
"""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import mixtral.ops as ops
from common import Bench, main, with_backward

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
# (queries, keys, window)
CASES = {
    "cpu": [(512, 512, 0), (2048, 2048, 0), (2048, 2048, 256), (4096, 4096, 128), (1, 4096, 0), (1, 4096, 256)],
    "cuda": [(4096, 4096, 4096), (8192, 8192, 0)] + [(n, n, 4096) for n in (8192, 16384, 32768)],
}
# (tokens, window)
BACKWARD_CASES = {"cpu": [(512, 0), (2048, 0), (2048, 256)], "cuda": [(4096, 0), (4096, 512)]}
DTYPES = {"cpu": (torch.float32, torch.bfloat16, torch.float16), "cuda": (torch.bfloat16,)}


def sight(queries: int, keys: int, window: int, device: str) -> Tensor | None:
    """[T, L], whether a query sees a key; None where is_causal says it all."""
    if queries == keys and (window == 0 or window >= keys):
        return None
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance >= 0) & ((distance < window) | (window == 0))


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Callable:
    """q [T,Nq,D], k, v [L,Nkv,D]. SDPA knows no window: it gets a dense mask, and then a copy of k and v a head."""
    q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
    if mask is None:
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def sdpa_with_backward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Callable:
    """The gradients of k and v are summed over the query heads that share them."""
    q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if mask is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return with_backward(attention, q, k, v)


def flex(q: Tensor, k: Tensor, v: Tensor, window: int, compiled: bool = True) -> Callable:
    """q, k, v [T,heads,D], as many queries as keys."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    reach = window or len(k)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < reach)

    q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
    mask = create_block_mask(sees, None, None, q.shape[2], k.shape[2], device=q.device.type)
    attention = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    return lambda: attention(q, k, v, block_mask=mask, enable_gqa=True)


def make(bench: Bench, queries: int, keys: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v, cu_seqlens_q, cu_seqlens_k of one sequence."""
    q = torch.randn(queries, HEADS, HEAD_DIM, device=bench.device).to(dtype)
    k, v = torch.randn(2, keys, KV_HEADS, HEAD_DIM, device=bench.device).to(dtype)
    return q, k, v, *(torch.tensor([0, n], device=bench.device) for n in (queries, keys))


def run_case(bench: Bench, queries: int, keys: int, window: int, dtype: torch.dtype, quick: bool = False) -> None:
    """With ``quick``, no peer that is compiled first."""
    q, k, v, cu_q, cu_k = make(bench, queries, keys, dtype)
    pairs = sum(min(keys - queries + i + 1, window or keys) for i in range(queries))
    seen = min(keys, queries + window - 1) if window else keys
    peers = {"torch SDPA": sdpa(q, k, v, sight(queries, keys, window, bench.device))}
    if not quick and bench.device == "cuda" and importlib.util.find_spec("triton"):
        peers["torch flex_attention"] = flex(q, k, v, window)
    bench.compare(
        f"queries={queries} keys={keys} window={window} {dtype}",
        lambda: ops.sliding_window_attention(q, k, v, cu_q, cu_k, window),
        peers,
        gflop=4 * pairs * HEADS * HEAD_DIM / 1e9,
        gigabytes=(2 * q.nbytes + (k.nbytes + v.nbytes) * seen / keys) / 1e9,
        dtype=dtype,
    )


def run_backward(bench: Bench, tokens: int, window: int, dtype: torch.dtype) -> None:
    q, k, v, cu, _ = make(bench, tokens, tokens, dtype)
    pairs = sum(min(i + 1, window or tokens) for i in range(tokens))
    bench.compare(
        f"forward and backward T={tokens} window={window} {dtype}",
        with_backward(lambda q, k, v: ops.sliding_window_attention(q, k, v, cu, cu, window), q, k, v),
        {"torch SDPA": sdpa_with_backward(q, k, v, sight(tokens, tokens, window, bench.device))},
        gflop=(4 + 10) * pairs * HEADS * HEAD_DIM / 1e9,
        gigabytes=(6 * q.nbytes + 4 * (k.nbytes + v.nbytes)) / 1e9,
        dtype=dtype,
        budget=4.0,
    )


def run(bench: Bench) -> None:
    for dtype in DTYPES[bench.device]:
        for tokens, window in BACKWARD_CASES[bench.device]:
            run_backward(bench, tokens, window, dtype)
        for case in CASES[bench.device]:
            run_case(bench, *case, dtype)


if __name__ == "__main__":
    main("sliding_window_attention", run)
