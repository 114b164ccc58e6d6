"""Times of one family, against peers that need no compilation: ``timings.py NAME [--dry-run]``.

Each case leaves its row in the record ``cuda-timings`` at once. ``--dry-run`` names the cases.
"""

import argparse
import sys
from functools import partial

import torch

import bench_moe_mlp as moe
import bench_rolling_kv_cache as cache
import bench_sliding_window_attention as attention
from common import Bench
from stages import TIMED

TOKENS = (1, 16, 64, 256, 4096)
KEYS = (4096, 16384)
WINDOW = 4096


def time_moe(bench: Bench, quantize: str | None) -> None:
    experts = moe.make_experts(bench.device)
    if quantize:
        experts = moe.as_ours(experts.gate_up, experts.down, quantize)
    for tokens in TOKENS:
        moe.run_case(bench, experts, "uniform", tokens, f"8x7B {quantize or 'bf16'}", quick=True)
        bench.write()


def time_decode(bench: Bench) -> None:
    for keys in KEYS:
        cache.bench_decode(bench, torch.bfloat16, 1, keys, 0)
        bench.write()


def time_prefill(bench: Bench) -> None:
    for keys in KEYS:
        attention.run_case(bench, keys, keys, WINDOW, torch.bfloat16, quick=True)
        bench.write()


CASES = {
    "moe bf16": partial(time_moe, quantize=None),
    "moe fp8": partial(time_moe, quantize="fp8"),
    "moe int4": partial(time_moe, quantize="int4"),
    "attention decode": time_decode,
    "attention prefill": time_prefill,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=list(TIMED))
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    if arguments.dry_run:
        print(f"{arguments.name}: tokens {TOKENS}" if "moe" in arguments.name else f"{arguments.name}: keys {KEYS}")
        return
    torch.manual_seed(0)
    bench = Bench("cuda-timings", "cuda")
    with torch.no_grad():
        CASES[arguments.name](bench)
    bench.finish(record=True)


if __name__ == "__main__":
    sys.exit(main())
