"""How fast a core multiplies rows with packed weights that its cache holds, by instruction set and type of weights.

A model's speed is the lower of two: that of memory, and this one. It is given in weights a cycle. A cycle is taken from
the measured peak of multiply-adds in f32, at two a cycle. The bound is that peak: each row costs a multiply-add for
each weight. Products of bf16 (avx512_bf16, amx) do more in an instruction and have no such bound.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch

import mixtral.ops as ops
from common import Bench, Row, main, native_isa
from roofline import measure_fma_peak

ISAS = ("avx2", "avx512", "avx512_bf16", "amx")
LANES = {"avx2": 8}  # of f32; sixteen from avx512 on
TYPES = ("bf16", "int8", "fp8", "int4")
ROWS = (1, 2, 4, 8)
COLUMNS, DEPTH = (64, 320), 1024  # at most 640 KiB


def seconds(function: Callable[[], object]) -> float:
    """Of one call: the fastest of some runs."""
    runs = []
    for _ in range(30):
        start = time.perf_counter()
        for _ in range(20):
            function()
        runs.append((time.perf_counter() - start) / 20)
    return min(runs)


def weights_per_second() -> dict[str, float]:
    """{type and rows: rate} of one thread under MIXTRAL_CPU_ISA. What a call costs beside its weights is not in it: the
    time of a small product is subtracted from that of a larger one."""
    torch.set_num_threads(1)
    rates = {}
    for name in TYPES:
        small, large = (
            ops.pack_weight(torch.randn(1, columns, DEPTH).bfloat16(), None if name == "bf16" else name)
            for columns in COLUMNS
        )
        for rows in ROWS:
            a, offs = torch.randn(rows, DEPTH).bfloat16(), torch.tensor([rows])
            more = seconds(lambda a=a, b=large, offs=offs: ops.grouped_gemm(a, b, offs)) - seconds(
                lambda a=a, b=small, offs=offs: ops.grouped_gemm(a, b, offs)
            )
            rates[f"{name}, {rows} row{'s' * (rows > 1)}"] = (COLUMNS[1] - COLUMNS[0]) * DEPTH / more
    return rates


def run(bench: Bench) -> None:
    native = native_isa()
    for isa in ISAS[: ISAS.index(native) + 1] if native in ISAS else ():
        lanes = LANES.get(isa, 16)
        peak = measure_fma_peak(1, "avx2" if isa == "avx2" else "avx512")
        cycles = 1e9 * peak / (2 * 2 * lanes)  # a second
        result = subprocess.run(
            [sys.executable, __file__, "--child"],
            stdout=subprocess.PIPE,
            check=True,
            env=os.environ | {"MIXTRAL_CPU_ISA": isa},
        )
        for case, rate in json.loads(result.stdout).items():
            rows, value = int(case.split()[1]), rate / cycles
            bound = 2 * lanes / rows if isa in ("avx2", "avx512") else None
            row = Row(
                f"{case}, {isa}", "one core, in the cache", value, "weights/cycle", bound, bound and 100 * value / bound
            )
            bench.rows.append(row)
            print(f"{row.case:30s} {value:6.2f} weights/cycle" + (f" {row.percent_of_bound:5.1f} %" if bound else ""))


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        print(json.dumps(weights_per_second()))
    else:
        main("weight_kernels", run, devices=("cpu",))
