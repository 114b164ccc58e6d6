"""The rolling cache against a cache of full length: writing a chunk (also behind rope), and decoding a batch."""

import torch
import torch.nn.functional as F

import mixtral.ops as ops
from common import Bench, main

HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 16
DECODES = {  # sequences, length, window
    "cpu": ((1, 4096, 0), (8, 4096, 0), (8, 4096, 512)),
    "cuda": ((1, 4096, 4096), (8, 4096, 4096), (32, 4096, 4096), (8, 4096, 512)),
}


def bench_write(bench: Bench, dtype: torch.dtype) -> None:
    k_cache, v_cache = torch.zeros(2, 256, PAGE, KV_HEADS, HEAD_DIM, device=bench.device, dtype=dtype)
    for tokens in (1, 512):
        k, v = torch.randn(2, tokens, KV_HEADS, HEAD_DIM, device=bench.device).to(dtype)
        slots = torch.randperm(256 * PAGE, device=bench.device)[:tokens]

        def index_put(k=k, v=v, slots=slots) -> None:
            k_cache.view(-1, KV_HEADS, HEAD_DIM)[slots] = k
            v_cache.view(-1, KV_HEADS, HEAD_DIM)[slots] = v

        bench.compare(
            f"write T={tokens} {dtype}",
            lambda k=k, v=v, slots=slots: ops.rolling_kv_cache_write(k_cache, v_cache, k, v, slots),
            {"torch index_put": index_put},
            gigabytes=2 * (k.nbytes + v.nbytes) / 1e9,
        )


def bench_rope_write(bench: Bench, dtype: torch.dtype) -> None:
    k_cache, v_cache = torch.zeros(2, 256, PAGE, KV_HEADS, HEAD_DIM, device=bench.device, dtype=dtype)
    for tokens in (1, 16, 512):
        qkv = torch.randn(tokens, HEADS + 2 * KV_HEADS, HEAD_DIM, device=bench.device).to(dtype)
        q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        positions = torch.arange(tokens, device=bench.device)
        slots = torch.randperm(256 * PAGE, device=bench.device)[:tokens]

        def two_ops(q=q, k=k, v=v, positions=positions, slots=slots) -> None:
            ops.rolling_kv_cache_write(k_cache, v_cache, ops.rope(q, k, positions, 1e6)[1], v, slots)

        bench.compare(
            f"rope and write T={tokens} {dtype}",
            lambda q=q, k=k, v=v, positions=positions, slots=slots: ops.rolling_kv_cache_rope_write(
                q, k, v, positions, 1e6, k_cache, v_cache, slots
            ),
            {"rope, then write": two_ops},
            gigabytes=2 * qkv.nbytes / 1e9,
        )


def bench_decode(bench: Bench, dtype: torch.dtype, sequences: int, length: int, window: int) -> None:
    seen = min(window or length, length)
    columns = -(-seen // PAGE) + 1
    k_cache, v_cache = torch.randn(2, sequences * columns, PAGE, KV_HEADS, HEAD_DIM, device=bench.device).to(dtype)
    q = torch.randn(sequences, HEADS, HEAD_DIM, device=bench.device).to(dtype)
    table = torch.randperm(sequences * columns, device=bench.device).view(sequences, columns)
    cu = torch.arange(sequences + 1, device=bench.device)
    lens = torch.full((sequences,), length, device=bench.device)
    # The peer gets what it likes best: contiguous keys of the window alone, [B, Nkv, window, D].
    k, v = torch.randn(2, sequences, KV_HEADS, seen, HEAD_DIM, device=bench.device).to(dtype)
    bench.compare(
        f"decode B={sequences} length={length} window={window} {dtype}",
        lambda: ops.rolling_kv_cache_attention(q, k_cache, v_cache, table, cu, lens, window),
        {"torch SDPA": lambda: F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)},
        gigabytes=(k.nbytes + v.nbytes + 2 * q.nbytes) / 1e9,
    )


def run(bench: Bench) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        bench_write(bench, dtype)
        bench_rope_write(bench, dtype)
        for sequences, length, window in DECODES[bench.device]:
            bench_decode(bench, dtype, sequences, length, window)


if __name__ == "__main__":
    main("rolling_kv_cache", run)
