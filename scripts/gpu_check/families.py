"""One family of Hopper kernels against the f64 reference: ``families.py NAME [--once | --dry-run]``.

First a small shape, then that of Mixtral 8x7B; each gives rows of the record ``cuda-families``. Exit status 0, or 3 if
a kernel ran to its end with an error larger than allowed; one that cannot run ends in a traceback and status 1.
``--once`` runs one launch of the large shape and checks nothing; ``--dry-run`` checks a tiny shape on the CPU.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import mixtral.ops as ops
from common import Bench, Row
from conftest import TOLERANCES, share_of_bound
from mixtral import reference
from runner import WRONG
from stages import FAMILIES

FP8_NORM = (
    2**-6
)  # tensor cores keep fewer bits of a sum of e4m3 products than f32: far from the error of rounding to it


@dataclass(frozen=True)
class Size:
    """Of one expert layer and one attention layer."""

    name: str
    hidden: int
    intermediate: int
    keys: int
    experts: int = 8
    kv_heads: int = 8


TINY = Size("tiny", 64, 128, 150, experts=4, kv_heads=1)  # for the CPU
SMALL = Size("small", 256, 512, 600)
TRUE = Size("8x7B", 4096, 14336, 4096)


@dataclass(frozen=True)
class Problem:
    """A call, and how its result is judged: the largest error, absolute and as a share of what is allowed."""

    label: str
    run: Callable[[], Tensor]
    judge: Callable[[Tensor], tuple[float, float]]


def normal(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def by_reference(op: str, arguments: tuple) -> Callable[[Tensor], tuple[float, float]]:
    """Judged by the reference in f64 and by the table of tolerances of the tests."""

    def judge(actual: Tensor) -> tuple[float, float]:
        function = getattr(reference, op)
        wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
        oracle = function(*wide)
        share = share_of_bound(actual, oracle, TOLERANCES[op](*arguments), lambda: function(*arguments))
        return (actual.double() - oracle).abs().max().item(), share

    return judge


def by_norm(oracle: Callable[[], Tensor]) -> Callable[[Tensor], tuple[float, float]]:
    def judge(actual: Tensor) -> tuple[float, float]:
        want = oracle()
        error = actual.double() - want
        share = (error.norm() / (FP8_NORM * want.norm())).nan_to_num(nan=torch.inf).item()
        return error.abs().max().item(), share

    return judge


def weight(size: Size, rows: int, columns: int, quantize: str | None, device: str) -> tuple[Tensor, Tensor]:
    """[E, rows, columns] as the kernels read it and what it stands for. Packing is done on the CPU, for one expert:
    the others are its blocks of 32 rows in another order."""
    if quantize is None:
        plain = normal(size.experts, rows, columns, device=device) / columns**0.5
        return plain, plain
    one = ops.pack_weight(torch.randn(1, rows, columns).mul_(columns**-0.5).bfloat16(), quantize)
    plain = ops.unpack_weight(one).to(device)
    raw = one.view(torch.uint8).to(device)
    packed = torch.cat([raw.roll(e, 1) for e in range(size.experts)]).view(one.dtype)
    return packed, torch.cat([plain.roll(32 * e, 1) for e in range(size.experts)])


def fp8_product(rows: Tensor, plain: Tensor, offs: Tensor) -> Tensor:
    return reference.grouped_gemm(reference.round_rows_to_e4m3(rows).double(), plain.double(), offs)


def product(size: Size, rows: int, quantize: str | None, device: str) -> Problem:
    """grouped_gemm of sorted rows; the experts get unequal numbers of them, one none."""
    b, plain = weight(size, size.hidden, size.intermediate, quantize, device)
    a = normal(rows, size.intermediate, device=device)
    cuts = torch.linspace(0, 1, size.experts, device=device).square() * rows
    offs = torch.cat([cuts[1:].round(), cuts[-1:]]).int()
    if quantize == "fp8":
        judge = by_norm(lambda: fp8_product(a, plain, offs))
    else:
        judge = by_reference("grouped_gemm", (a, plain, offs))
    return Problem(f"product of {rows} rows", lambda: ops.grouped_gemm(a, b, offs), judge)


def fp8_layer(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    rows, offs, row_map = reference.moe_permute(x, ids, len(down))
    activated = reference.swiglu(fp8_product(rows, gate_up, offs).bfloat16().double()).bfloat16()
    return reference.moe_unpermute(fp8_product(activated, down, offs), weights.double(), row_map)


def layer(size: Size, tokens: int, quantize: str | None, device: str) -> Problem:
    """moe_mlp, two experts a token."""
    gate_up, plain_gate_up = weight(size, 2 * size.intermediate, size.hidden, quantize, device)
    down, plain_down = weight(size, size.hidden, size.intermediate, quantize, device)
    x = normal(tokens, size.hidden, device=device)
    weights, ids = ops.topk_softmax(torch.randn(tokens, size.experts, device=device), 2)
    plain = (x, weights, ids, plain_gate_up, plain_down)
    judge = by_norm(lambda: fp8_layer(*plain)) if quantize == "fp8" else by_reference("moe_mlp", plain)
    return Problem(f"layer of {tokens} tokens", lambda: ops.moe_mlp(x, weights, ids, gate_up, down), judge)


def paged(size: Size, queries: list[int], page: int, window: int, device: str) -> Problem:
    """rolling_kv_cache_attention of sequences that end with so many queries; the pages lie in any order."""
    kv_lens = torch.tensor([max(size.keys - 7 * b, count) for b, count in enumerate(queries)], device=device)
    columns = -(-size.keys // page)
    k_cache, v_cache = normal(2, len(queries) * columns, page, size.kv_heads, 128, device=device)
    table = torch.randperm(len(queries) * columns, device=device).view(len(queries), columns)
    starts = torch.tensor([0, *queries], device=device).cumsum(0)
    q = normal(sum(queries), 4 * size.kv_heads, 128, device=device)
    arguments = (q, k_cache, v_cache, table, starts, kv_lens, window)
    return Problem(
        f"{queries} queries, {size.keys} keys, window {window}",
        lambda: ops.rolling_kv_cache_attention(*arguments),
        by_reference("rolling_kv_cache_attention", arguments),
    )


def packed(size: Size, window: int, device: str) -> Problem:
    """sliding_window_attention of three sequences."""
    counts = [size.keys // 2, 3, 129]
    starts = torch.tensor([0, *counts], device=device).cumsum(0)
    q = normal(sum(counts), 4 * size.kv_heads, 128, device=device)
    k, v = normal(2, sum(counts), size.kv_heads, 128, device=device)
    arguments = (q, k, v, starts, starts, window)
    return Problem(
        f"{counts} tokens, window {window}",
        lambda: ops.sliding_window_attention(*arguments),
        by_reference("sliding_window_attention", arguments),
    )


# By the limits in csrc/ops/grouped_gemm/hopper: routed up to 32 tokens of two experts, streamed up to 1024 rows, fp8
# and int4 always.
PROBLEMS: dict[str, list[Callable[[Size, str], Problem]]] = {
    "attention decode": [
        lambda size, device: paged(size, [1, 1, 1], 16, 0, device),
        lambda size, device: paged(size, [1, 2, 1, 1], 16, size.keys // 2 + 1, device),
    ],
    "stream bf16": [
        lambda size, device: product(size, 12, None, device),
        lambda size, device: product(size, 60, None, device),
        lambda size, device: layer(size, 300, None, device),
    ],
    "stream routed": [
        lambda size, device: layer(size, 1, None, device),
        lambda size, device: layer(size, 7, None, device),
        lambda size, device: layer(size, 32, None, device),
    ],
    "tile": [lambda size, device: product(size, 1500, None, device)],
    "tile swiglu": [lambda size, device: layer(size, 900, None, device)],
    "prefill packed": [
        lambda size, device: packed(size, 0, device),
        lambda size, device: packed(size, 200, device),
    ],
    "prefill paged": [
        lambda size, device: paged(size, [size.keys // 2, 100], 16, 0, device),
        lambda size, device: paged(size, [200, 100], 128, 150, device),
    ],
    "fp8": [
        lambda size, device: layer(size, 1, "fp8", device),
        lambda size, device: layer(size, 16, "fp8", device),
        lambda size, device: product(size, 200, "fp8", device),
        lambda size, device: product(size, 2000, "fp8", device),
    ],
    "int4": [
        lambda size, device: layer(size, 1, "int4", device),
        lambda size, device: layer(size, 16, "int4", device),
        lambda size, device: product(size, 200, "int4", device),
        lambda size, device: product(size, 2500, "int4", device),
    ],
}


def check(family: str, size: Size, device: str, bench: Bench) -> bool:
    """Whether all problems of this size are within what is allowed; each leaves its row at once."""
    good = True
    for make in PROBLEMS[family]:
        problem = make(size, device)
        error, share = problem.judge(problem.run())
        good &= share <= 1
        case = f"{family}, {size.name}: {problem.label}"
        print(f"{case}: largest error {error:.3g}, {share:.3f} of what is allowed", flush=True)
        bench.rows += [
            Row(case, "largest error", error, "absolute"),
            Row(f"{case}: share", "error / what is allowed", share, "x", bound=1.0),
        ]
        if device == "cuda":
            bench.write()
    return good


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=list(FAMILIES))
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.once:
        PROBLEMS[arguments.family][0](TRUE, "cuda").run()
        torch.cuda.synchronize()
        return 0
    device, sizes = ("cpu", [TINY]) if arguments.dry_run else ("cuda", [SMALL, TRUE])
    bench = Bench("cuda-families", device)
    return 0 if all([check(arguments.family, size, device, bench) for size in sizes]) else WRONG


if __name__ == "__main__":
    sys.exit(main())
