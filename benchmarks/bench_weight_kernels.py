"""How fast a core multiplies rows with packed weights that its cache holds, by instruction set and type of weights.

A model's speed is the lower of two: that of memory, and this one. It is given in weights a cycle. A cycle is taken from
the measured peak of multiply-adds in f32, at two a cycle. Two things bound it: each row costs a multiply-add for each
weight, and in avx2 a core starts four vector instructions a cycle on AMD, three on Intel, those that widen or decode
weights among them. Products of bf16 (avx512_bf16, amx) do more in an instruction and have no such bound.

Attention of one query token is given in multiply-adds a cycle, of three query heads that share a key head.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch

import mixtral.ops as ops
from common import Bench, Row, device_name, main, native_isa
from roofline import measure_fma_peak

ISAS = ("avx2", "avx512", "avx512_bf16", "amx")
LANES = {"avx2": 8}  # of f32; sixteen from avx512 on
TYPES = ("bf16", "int8", "fp8", "int4")
ROWS = (1, 2, 4, 8)
COLUMNS, DEPTH = (64, 320), 1024  # at most 640 KiB
WIDENING = {"bf16": 8, "int8": 20, "int4": 29, "fp8": 82}  # vector instructions of avx2 that make f32 of 64 weights
KEYS, HEADS, HEAD_DIM = (1024, 2048), 3, 128  # at most 1 MiB


def seconds(function: Callable[[], object]) -> float:
    """Of one call: the fastest of some runs."""
    runs = []
    for _ in range(30):
        start = time.perf_counter()
        for _ in range(8):
            function()
        runs.append((time.perf_counter() - start) / 8)
    return min(runs)


def products_of(name: str, columns: int, rows: int) -> Callable[[], object]:
    b = ops.pack_weight(torch.randn(1, columns, DEPTH).bfloat16(), None if name == "bf16" else name)
    a, offs = torch.randn(rows, DEPTH).bfloat16(), torch.tensor([rows])
    return lambda: ops.grouped_gemm(a, b, offs)


def attention_over(keys: int) -> Callable[[], object]:
    q, k, v = (torch.randn(n, h, HEAD_DIM).bfloat16() for n, h in ((1, HEADS), (keys, 1), (keys, 1)))
    ends = [torch.tensor([0, n], dtype=torch.int32) for n in (1, keys)]
    return lambda: ops.sliding_window_attention(q, k, v, *ends)


def rates() -> dict[str, float]:
    """{case: weights or multiply-adds a second} of one thread under MIXTRAL_CPU_ISA. What a call costs beside its work
    is not in it: the time of a small call is subtracted from that of a large one. The fastest of some rounds through
    all cases counts, since what else runs on the processor comes and goes."""
    torch.set_num_threads(1)
    cases = {
        f"{name}, {rows} row{'s' * (rows > 1)}": (
            (COLUMNS[1] - COLUMNS[0]) * DEPTH,
            [products_of(name, columns, rows) for columns in COLUMNS],
        )
        for name in TYPES
        for rows in ROWS
    }
    more_products = (KEYS[1] - KEYS[0]) * 2 * HEADS * HEAD_DIM
    cases[f"attention, {HEADS} heads"] = (more_products, [attention_over(keys) for keys in KEYS])
    rounds = [{case: [seconds(call) for call in calls] for case, (_, calls) in cases.items()} for _ in range(8)]
    found = {}
    for case, (work, _) in cases.items():
        small, large = (min(times) for times in zip(*(times[case] for times in rounds), strict=True))
        found[case] = work / (large - small)
    return found


def bound_of(case: str, isa: str, lanes: int) -> float | None:
    """In the unit of the case, a cycle."""
    if isa not in ("avx2", "avx512"):
        return None
    name, rows = case.split()[0].strip(","), case.split()[1]
    if name == "attention":
        return 2 * lanes
    products = 64 / lanes * int(rows)
    issued = (WIDENING[name] + products) / (4 if "AMD" in device_name("cpu") else 3) if isa == "avx2" else 0
    return 64 / max(products / 2, issued)


def run(bench: Bench) -> None:
    native = native_isa()
    for isa in ISAS[: ISAS.index(native) + 1] if native in ISAS else ():
        lanes = LANES.get(isa, 16)
        fma_set = "avx2" if isa == "avx2" else "avx512"
        peak = measure_fma_peak(1, fma_set)
        result = subprocess.run(
            [sys.executable, __file__, "--child"],
            stdout=subprocess.PIPE,
            check=True,
            env=os.environ | {"MIXTRAL_CPU_ISA": isa},
        )
        cycles = 1e9 * max(peak, measure_fma_peak(1, fma_set)) / (2 * 2 * lanes)  # a second
        for case, rate in json.loads(result.stdout).items():
            unit = "multiply-adds/cycle" if case.startswith("attention") else "weights/cycle"
            value, bound = rate / cycles, bound_of(case, isa, lanes)
            row = Row(f"{case}, {isa}", "one core, in the cache", value, unit, bound, bound and 100 * value / bound)
            bench.rows.append(row)
            print(f"{row.case:36s} {value:6.2f} {unit}" + (f" {row.percent_of_bound:5.1f} %" if bound else ""))


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        print(json.dumps(rates()))
    else:
        main("weight_kernels", run, devices=("cpu",))
