"""sliding_window_attention against scaled_dot_product_attention, with and without a window, prefill and decode."""

import torch
import torch.nn.functional as F

import mixtral.ops as ops
from common import Bench, main

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
# queries, keys, window
CASES = [(512, 512, 0), (2048, 2048, 0), (2048, 2048, 256), (4096, 4096, 128), (1, 4096, 0), (1, 4096, 256)]


def sdpa(q, k, v, window: int):
    """[T,Nq,D], [L,Nkv,D]: with a window the mask is dense, as SDPA has no window of its own."""
    queries, keys = q.shape[0], k.shape[0]
    distance = torch.arange(keys - queries, keys, device=q.device)[:, None] - torch.arange(keys, device=q.device)
    mask = (distance >= 0) & ((distance < window) | (window == 0))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    if queries == keys and window == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def run(bench: Bench) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for queries, keys, window in CASES:
            q = torch.randn(queries, HEADS, HEAD_DIM, device=bench.device).to(dtype)
            k, v = torch.randn(2, keys, KV_HEADS, HEAD_DIM, device=bench.device).to(dtype)
            cu_q, cu_k = (torch.tensor([0, n], device=bench.device) for n in (queries, keys))
            pairs = sum(min(keys - queries + i + 1, window or keys) for i in range(queries))  # query-key pairs in sight
            bench.compare(
                f"queries={queries} keys={keys} window={window} {dtype}",
                lambda q=q, k=k, v=v, a=cu_q, b=cu_k, w=window: ops.sliding_window_attention(q, k, v, a, b, w),
                lambda q=q, k=k, v=v, w=window: sdpa(q, k, v, w),
                "torch SDPA",
                gflop=4 * pairs * HEADS * HEAD_DIM / 1e9,
            )


if __name__ == "__main__":
    main("sliding_window_attention", run)
