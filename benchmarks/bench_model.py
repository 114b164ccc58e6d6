"""Whole models against transformers and llama.cpp: prefill, decode, memory, load; on CUDA Mixtral 8x7B (model_cuda.py).

Writes random checkpoints (``random_models.SHAPES``) into a folder, and lets engines that hold the same weights in as
many bits take turns, round after round; medians count. What a peer lacks to run is said and its rows stay empty.

The peers: ``pip install transformers gguf``, and llama.cpp built for this processor:

    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary llama-cpp-python llama-cpp-python

On a processor with AMX its code crashes on quantised files (llama-cpp-python 0.3.36): there, name what else it has, as
-DGGML_NATIVE=OFF -DGGML_AVX_VNNI=ON -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON.
``--isa avx2`` holds every engine to AVX2. llama.cpp is held to it by a build of its own, whose libraries
``--llama-avx2`` names: -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import model_cuda
from common import Bench, Row, device_name, native_isa
from peers.engines import missing_packages
from peers.turns import MEASURES, PEERS, Turns, run_turns
from random_models import BYTES_PER_WEIGHT, MIXTRAL_8X7B, SHAPES, Shape, write_checkpoint

LONGEST = 2048  # positions that the cache has to hold
PACKAGES = {"transformers": "transformers", "llama.cpp": "llama_cpp_python"}
GGUF = {"bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_K_M"}
# Memory that an engine may need, in multiples of its weights: transformers merges the experts while it loads.
FOOTPRINT = {"ours": 1.1, "transformers": 2.2, "llama.cpp": 1.0}

NATIVE = "native"  # not held to anything
ISAS = (NATIVE, "avx2", "avx512", "no_amx")


def isa_in_use(isa: str) -> str:
    """The name that MIXTRAL_CPU_ISA has for what ours uses under ``--isa isa``."""
    if isa == NATIVE:
        return native_isa()
    # All that a processor has but AMX: there ours takes plain AVX-512 on Intel's cores (csrc/ops/cpu/isa.cpp).
    return isa if isa != "no_amx" else "avx512" if "Intel" in device_name("cpu") else "avx512_bf16"


def isa_environment(isa: str, llama_avx2: Path | None = None) -> dict[str, str]:
    """What holds every engine to an instruction set below that of the processor."""
    if isa == NATIVE:
        return {}
    onednn, aten = {
        "avx2": ("AVX2", "avx2"),
        "avx512": ("AVX512_CORE", "avx512"),
        "no_amx": ("AVX512_CORE_BF16", "avx512"),
    }[isa]
    llama = {"LLAMA_CPP_LIB_PATH": str(llama_avx2)} if isa == "avx2" and llama_avx2 else {}
    return llama | {
        "MIXTRAL_CPU_ISA": isa_in_use(isa),
        "ONEDNN_MAX_CPU_ISA": onednn,
        "ATEN_CPU_CAPABILITY": aten,
        "MKL_ENABLE_INSTRUCTIONS": aten.upper(),
    }


def case_name(model: str, dtype: str, isa: str) -> str:
    return f"{model} {dtype}" if isa == NATIVE else f"{model} {dtype} {isa}"


def peers_of(dtype: str, isa: str, arguments: argparse.Namespace) -> list[str]:
    """transformers has no int8, fp8 or int4 of its own, llama.cpp no fp8, and only two builds of it are known here."""
    peers = [peer for peer in arguments.peers if dtype == "bfloat16" or peer != "transformers"]
    llama = dtype in GGUF and (isa == NATIVE or (isa == "avx2" and arguments.llama_avx2))
    return [peer for peer in peers if peer != "llama.cpp" or llama]


def groups_that_fit(paths: dict[str, Path], weight_bytes: float) -> list[dict[str, Path]]:
    """All engines together when memory allows, else ours beside one peer at a time."""
    need = weight_bytes * sum(FOOTPRINT[engine] for engine in paths)
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    if need < available or len(paths) <= 2:
        return [paths]
    return [{"ours": paths["ours"], peer: path} for peer, path in paths.items() if peer != "ours"]


def against(case: str, metric: str, unit: str, ours: float, peer: str, theirs: float | None) -> Row:
    """A row with a peer."""
    return Row(case, metric, ours, unit, peer=peer, peer_value=theirs, ratio=theirs and ours / theirs)


def rate_rows(case: str, peers: list[str], groups: dict[str, Turns]) -> list[Row]:
    """Prefill and decode against each peer, ``groups[peer]`` being the turns it was in."""
    rows = []
    for measure in MEASURES:
        for peer in filter(measure.peers.__contains__, peers):
            turns = groups.get(peer) or next(iter(groups.values()))  # a peer that did not run: only ours counts
            ours, theirs = turns.rate("ours", measure.name), turns.rate(peer, measure.name)
            if ours:
                rows.append(against(case, measure.name, "tokens/s", ours, peer, theirs))
    return rows


def bound_rows(case: str, shape: Shape, dtype: str, isa: str, turns: Turns) -> list[Row]:
    """Arithmetic of the prefill, against f32 multiply-adds where bf16 has no instructions of its own; decoding against
    reading the weights, batch 8 against batch 1."""
    peak = statistics.median(turns.fma_peak) if isa in ("avx2", "avx512") else None
    rows = []
    for measure in MEASURES[:2]:
        if rate := turns.rate("ours", measure.name):
            gflops = rate * shape.prefill_flop(measure.tokens) / measure.tokens / 1e9
            rows.append(Row(case, measure.name, gflops, "GFLOP/s", peak, peak and 100 * gflops / peak))
    if decode := turns.rate("ours", "decode"):
        bound = 1e9 * statistics.median(turns.bandwidth) / (shape.weights_per_token * BYTES_PER_WEIGHT[dtype])
        rows.append(Row(case, "decode", decode, "tokens/s", bound, 100 * decode / bound))
        if batch := turns.rate("ours", "decode batch 8"):
            rows.append(against(case, "decode batch 8", "tokens/s", batch, "ours, batch 1", decode))
    return rows


def binary_peak_memory(folder: Path, dtype: str, threads: int, environment: dict[str, str]) -> int:
    """Bytes that the binary holds at most while it reads a prompt of ``LONGEST`` tokens and writes a few."""
    work = ["--prompt-tokens", str(LONGEST), "--new-tokens", "8", "--repeat", "1", "--threads", str(threads), "--json"]
    command = [sys.executable, "-m", "mixtral", "bench", str(folder), "--dtype", dtype, *work]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ | environment)
    return json.loads(result.stdout)["peak_memory_bytes"]


def binary_memory_row(case: str, weight_bytes: float, peak_memory: int) -> Row:
    """The binary by itself; a Python process holds an imported torch as well."""
    return Row(case, "weights / peak memory of the binary", weight_bytes / peak_memory, "x")


def resource_rows(case: str, weights: float, peers: list[str], groups: dict[str, Turns]) -> list[Row]:
    """Peak memory of the process and load time against ``weights`` bytes, so that higher is better."""
    rows = []
    for metric, unit, work, cost in (
        ("weights / peak memory", "x", weights, lambda turns: turns.peak_memory),
        ("weights loaded", "GB/s", weights / 1e9, lambda turns: turns.load_seconds),
    ):
        for peer in peers:
            costs = cost(groups.get(peer) or next(iter(groups.values())))
            theirs = work / costs[peer] if peer in costs else None
            rows.append(against(case, metric, unit, work / costs["ours"], peer, theirs))
    return rows


def merged(groups: list[Turns]) -> Turns:
    """Everything that ours did, whoever it took turns with."""
    everything = Turns()
    for turns in groups:
        everything.bandwidth += turns.bandwidth
        everything.fma_peak += turns.fma_peak
        for key, implementations in turns.rates.items():
            for experts, rates in implementations.items():
                everything.rates[key][experts] += rates
    return everything


def run_case(model: str, dtype: str, isa: str, available: set[str], arguments: argparse.Namespace) -> list[Row]:
    """All rows of one model in one dtype under one instruction set."""
    shape, case, environment = SHAPES[model], case_name(model, dtype, isa), isa_environment(isa, arguments.llama_avx2)
    weights, peers = shape.weight_bytes(dtype), peers_of(dtype, isa, arguments)
    folder = write_checkpoint(shape, arguments.folder / model)
    paths = {"ours": folder}
    if "transformers" in available and "transformers" in peers:
        paths["transformers"] = folder
    if "llama.cpp" in available and "llama.cpp" in peers:
        from peers.gguf_models import write_gguf

        paths["llama.cpp"] = write_gguf(shape, folder, GGUF[dtype])
    groups: dict[str, Turns] = {}
    for engines in groups_that_fit(paths, weights):
        print(f"{case}: {', '.join(engines)}", flush=True)
        limits = arguments.threads, arguments.rounds, arguments.seconds
        measures = [measure for measure in MEASURES if measure.name in arguments.measures]
        turns = run_turns(engines, dtype, *limits, isa_in_use(isa), environment, measures)
        groups |= dict.fromkeys(engines, turns)
    everything = merged(list({id(turns): turns for turns in groups.values()}.values()))
    return (
        rate_rows(case, peers, groups)
        + bound_rows(case, shape, dtype, isa_in_use(isa), everything)
        + resource_rows(case, weights, peers, groups)
        + [binary_memory_row(case, weights, binary_peak_memory(folder, dtype, arguments.threads, environment))]
    )


def show(row: Row) -> None:
    """One line of the table."""
    bound = f"{row.percent_of_bound:5.1f} % of bound" if row.percent_of_bound else ""
    peer = f"x {row.ratio:.2f} {row.peer} ({row.peer_value:.2f})" if row.ratio else row.peer or ""
    print(f"{row.case:24s} {row.metric:48s} {row.value:9.2f} {row.unit:9s} {bound:18s} {peer}")


def parse_arguments() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=names, default=["small"], help=f"of {','.join(SHAPES)}")
    parser.add_argument("--dtypes", type=names, default=list(GGUF), help=f"of {','.join(BYTES_PER_WEIGHT)}")
    parser.add_argument("--peers", type=names, default=PEERS, help=f"of {','.join(PEERS)}")
    parser.add_argument("--isa", type=names, default=[NATIVE], help=f"held to no more than these, of {','.join(ISAS)}")
    parser.add_argument("--measures", type=names, default=[measure.name for measure in MEASURES], help="of all")
    parser.add_argument("--llama-avx2", type=Path, help="folder of llama.cpp's libraries, built for AVX2")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="cuda: Mixtral 8x7B instead")
    parser.add_argument("--layers", type=int, default=MIXTRAL_8X7B.layers, help="of Mixtral 8x7B, at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which a case starts no new round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "mixtral-bench-models")
    parser.add_argument("--record", action="store_true", help="write benchmarks/records/<date>-<device>-model.json")
    arguments = parser.parse_args()
    measures = [measure.name for measure in MEASURES]
    for option, known in (
        ("models", SHAPES),
        ("dtypes", BYTES_PER_WEIGHT),
        ("peers", PEERS),
        ("isa", ISAS),
        ("measures", measures),
    ):
        if unknown := set(getattr(arguments, option)) - set(known):
            parser.error(f"--{option}: expected names among {', '.join(known)}, got {', '.join(sorted(unknown))}")
    return arguments


def run_cpu(bench: Bench, arguments: argparse.Namespace) -> None:
    """All models under all instruction sets in all dtypes."""
    bench.versions["instruction set"] = native_isa()
    available = set()
    for peer in arguments.peers:
        if missing := missing_packages(peer):
            print(f"{peer}: its rows stay empty, these packages are not installed: {', '.join(missing)}")
        else:
            available.add(peer)
            bench.versions[peer] = importlib.metadata.version(PACKAGES[peer])
    for model, isa, dtype in itertools.product(arguments.models, arguments.isa, arguments.dtypes):
        bench.rows += run_case(model, dtype, isa, available, arguments)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    bench = Bench("model", arguments.device)
    if arguments.device == "cuda":
        model_cuda.run(bench, arguments.layers, arguments.rounds)
    else:
        run_cpu(bench, arguments)
    for row in bench.rows:
        show(row)
    bench.finish(arguments.record)


if __name__ == "__main__":
    main()
