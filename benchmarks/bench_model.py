"""Whole models on the CPU against transformers and llama.cpp: prefill, decode, memory, load.

Writes random checkpoints (``random_models.SHAPES``) into a folder, and lets engines that hold the same weights in as
many bits take turns, round after round; medians count. What a peer lacks to run is said and its rows stay empty.

The peers: ``pip install transformers gguf`` and llama.cpp for this processor, without its AMX code, which crashes on
quantised files (llama-cpp-python 0.3.36):

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX_VNNI=ON -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON
    -DGGML_AVX512_BF16=ON" pip install --no-binary llama-cpp-python llama-cpp-python
"""

import argparse
import importlib.metadata
import statistics
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch

from common import Bench, Row, measure_read_bandwidth
from engines import Worker, missing_packages
from random_models import SHAPES, Shape, write_checkpoint

PEERS = ("transformers", "llama.cpp")


@dataclass(frozen=True)
class Measure:
    """One thing that an engine is asked to do, and how many tokens that makes."""

    name: str
    command: str
    arguments: dict[str, int]
    tokens: int
    peers: tuple[str, ...] = PEERS


MEASURES = [
    Measure("prefill 512", "prefill", {"tokens": 512}, 512),
    Measure("prefill 2048", "prefill", {"tokens": 2048}, 2048),
    Measure("decode", "decode", {"batch": 1, "prompt": 128, "steps": 64}, 64),
    Measure("decode batch 8", "decode", {"batch": 8, "prompt": 128, "steps": 32}, 8 * 32, peers=("transformers",)),
]
LONGEST = 2048  # positions that the cache has to hold
PACKAGES = {"transformers": "transformers", "llama.cpp": "llama_cpp_python"}
EXPERTS = {"transformers": ["eager", "grouped_mm"]}  # its better implementation counts
GGUF = {"bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_K_M"}
BYTES_PER_WEIGHT = {"bfloat16": 2.0, "int8": 1.0, "int4": 0.53125}  # int4: with a byte of scale for every 32
# Memory that an engine may need, in multiples of its weights: transformers merges the experts while it loads.
FOOTPRINT = {"ours": 1.1, "transformers": 2.2, "llama.cpp": 1.0}

# Ratios to the peer that the project sets itself, (measure, dtype, peer), and for decoding the percentage of the bound.
RATIO_GOALS = {
    ("prefill 512", "bfloat16", "transformers"): 1.5,
    ("prefill 2048", "bfloat16", "transformers"): 1.5,
    ("prefill 512", "bfloat16", "llama.cpp"): 12.0,
    ("prefill 2048", "bfloat16", "llama.cpp"): 12.0,
    ("prefill 512", "int8", "llama.cpp"): 10.0,
    ("prefill 512", "int4", "llama.cpp"): 6.0,
    ("decode", "bfloat16", "llama.cpp"): 1.0,
    ("decode", "int8", "llama.cpp"): 1.1,
    ("decode", "int4", "llama.cpp"): 1.25,
}
# A token of mini costs overhead, not memory traffic.
MINI_RATIO_GOALS = {("decode", "bfloat16", "transformers"): 3.0} | {("decode", d, "llama.cpp"): 1.0 for d in GGUF}
BOUND_GOALS = {"bfloat16": 90.0, "int8": 90.0, "int4": 80.0}
BATCH_GOAL = 2.2


@dataclass
class Turns:
    """What engines that took turns did: rates in tokens/s by engine, measure and experts implementation."""

    rates: dict[tuple[str, str], dict[str, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    load_seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: dict[str, float] = field(default_factory=dict)
    bandwidth: list[float] = field(default_factory=list)  # GB/s, once a round

    def rate(self, engine: str, measure: str) -> float | None:
        """The median of the engine's best implementation; None when it was not asked."""
        implementations = self.rates.get((engine, measure), {})
        return max(map(statistics.median, implementations.values()), default=None)


def run_turns(engines: dict[str, Path], dtype: str, rounds: int, threads: int) -> Turns:
    """Load every engine (name -> its model's path) and let them take turns."""
    turns, workers = Turns(), []
    try:
        for engine, path in engines.items():
            workers.append(Worker(engine, path, dtype, threads))
            turns.load_seconds[engine] = workers[-1].load_seconds
            print(f"  {engine}: loaded in {workers[-1].load_seconds:.1f} s", flush=True)
            workers[-1].ask("decode", batch=1, prompt=16, steps=2)  # warms up
        for _ in range(rounds):
            turns.bandwidth.append(measure_read_bandwidth("cpu"))
            for measure in MEASURES:
                for worker in workers:
                    run_measure(worker, measure, turns)
        for worker in workers:
            turns.peak_memory[worker.engine] = worker.ask("peak_memory")
    finally:
        for worker in workers:
            worker.close()
    return turns


def run_measure(worker: Worker, measure: Measure, turns: Turns) -> None:
    """Let one engine do one thing in each of its implementations."""
    if worker.engine not in ("ours", *measure.peers):
        return
    for experts in EXPERTS.get(worker.engine, [""]):
        if experts:
            worker.ask("use_experts", implementation=experts)
        rate = measure.tokens / worker.ask(measure.command, **measure.arguments)
        turns.rates[worker.engine, measure.name][experts].append(rate)
        print(f"  {measure.name:14s} {worker.engine} {experts}: {rate:.1f} tokens/s", flush=True)


def groups_that_fit(paths: dict[str, Path], weight_bytes: float) -> list[dict[str, Path]]:
    """All engines together when memory allows, else ours beside one peer at a time."""
    need = weight_bytes * sum(FOOTPRINT[engine] for engine in paths)
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    if need < available or len(paths) <= 2:
        return [paths]
    return [{"ours": paths["ours"], peer: path} for peer, path in paths.items() if peer != "ours"]


def against(case: str, metric: str, unit: str, ours: float, peer: str, theirs: float | None, goal: float | None) -> Row:
    """A row with a peer."""
    return Row(case, metric, ours, unit, peer=peer, peer_value=theirs, ratio=theirs and ours / theirs, goal=goal)


def rate_rows(model: str, dtype: str, peers: list[str], groups: dict[str, Turns]) -> list[Row]:
    """Prefill and decode against each peer, ``groups[peer]`` being the turns it was in."""
    goals = RATIO_GOALS | MINI_RATIO_GOALS if model == "mini" else RATIO_GOALS
    rows = []
    for measure in MEASURES:
        for peer in filter(measure.peers.__contains__, peers):
            turns = groups.get(peer) or next(iter(groups.values()))  # a peer that did not run: only ours counts
            ours, theirs = turns.rate("ours", measure.name), turns.rate(peer, measure.name)
            goal = goals.get((measure.name, dtype, peer))
            rows.append(against(f"{model} {dtype}", measure.name, "tokens/s", ours, peer, theirs, goal))
    return rows


def bound_rows(model: str, dtype: str, turns: Turns) -> list[Row]:
    """Rate of arithmetic in the prefill, decoding against reading the weights, batch 8 against batch 1."""
    shape, case = SHAPES[model], f"{model} {dtype}"
    rows = []
    for measure in MEASURES[:2]:
        gflop = shape.prefill_flop(measure.tokens) / measure.tokens / 1e9
        rows.append(Row(case, measure.name, turns.rate("ours", measure.name) * gflop, "GFLOP/s"))
    decode = turns.rate("ours", "decode")
    bound = 1e9 * statistics.median(turns.bandwidth) / (shape.weights_per_token * BYTES_PER_WEIGHT[dtype])
    goal = None if model == "mini" else BOUND_GOALS[dtype]
    rows.append(Row(case, "decode", decode, "tokens/s", bound, 100 * decode / bound, goal=goal))
    batch = turns.rate("ours", "decode batch 8")
    rows.append(against(case, "decode batch 8", "tokens/s", batch, "ours, batch 1", decode, BATCH_GOAL))
    return rows


def resource_rows(model: str, dtype: str, peers: list[str], groups: dict[str, Turns]) -> list[Row]:
    """Peak memory and load time, both as shares of the weights so that higher is better."""
    shape, case = SHAPES[model], f"{model} {dtype}"
    weights = shape.weights * BYTES_PER_WEIGHT[dtype]
    allowed = 1.05 * weights + shape.cache_bytes(LONGEST) + 300 * 2**20
    rows = []
    for metric, unit, work, cost in (
        ("weights / peak memory", "x", weights, lambda turns: turns.peak_memory),
        ("weights loaded", "GB/s", weights / 1e9, lambda turns: turns.load_seconds),
    ):
        for peer in peers:
            costs = cost(groups.get(peer) or next(iter(groups.values())))
            theirs = work / costs[peer] if peer in costs else None
            rows.append(against(case, metric, unit, work / costs["ours"], peer, theirs, None))
    peak = max(turns.peak_memory["ours"] for turns in groups.values())
    rows.append(Row(case, "weights / peak memory", weights / peak, "x", goal=weights / allowed))
    return rows


def merged(groups: list[Turns]) -> Turns:
    """Everything that ours did, whoever it took turns with."""
    everything = Turns()
    for turns in groups:
        everything.bandwidth += turns.bandwidth
        for key, implementations in turns.rates.items():
            for experts, rates in implementations.items():
                everything.rates[key][experts] += rates
    return everything


def run_case(model: str, dtype: str, peers: list[str], available: set[str], arguments: argparse.Namespace) -> list[Row]:
    """All rows of one model in one dtype."""
    shape: Shape = SHAPES[model]
    folder = write_checkpoint(shape, arguments.folder / model)
    paths = {"ours": folder}
    if "transformers" in available and "transformers" in peers:
        paths["transformers"] = folder
    if "llama.cpp" in available and "llama.cpp" in peers:
        from gguf_models import write_gguf

        paths["llama.cpp"] = write_gguf(shape, folder, GGUF[dtype])
    groups: dict[str, Turns] = {}
    for engines in groups_that_fit(paths, shape.weights * BYTES_PER_WEIGHT[dtype]):
        print(f"{model} {dtype}: {', '.join(engines)}", flush=True)
        turns = run_turns(engines, dtype, arguments.rounds, arguments.threads)
        groups |= dict.fromkeys(engines, turns)
    everything = merged(list({id(turns): turns for turns in groups.values()}.values()))
    return (
        rate_rows(model, dtype, peers, groups)
        + bound_rows(model, dtype, everything)
        + resource_rows(model, dtype, peers, groups)
    )


def show(row: Row) -> None:
    """One line of the table."""
    bound = f"{row.percent_of_bound:5.1f} % of bound" if row.percent_of_bound else ""
    peer = f"x {row.ratio:.2f} {row.peer} ({row.peer_value:.2f})" if row.ratio else row.peer or ""
    goal = f"goal {row.goal:.2f}" if row.goal else ""
    print(f"{row.case:16s} {row.metric:22s} {row.value:9.2f} {row.unit:9s} {bound:18s} {peer:36s} {goal}")


def parse_arguments() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=names, default=["mini"], help=f"of {','.join(SHAPES)}")
    parser.add_argument("--dtypes", type=names, default=list(GGUF), help=f"of {','.join(GGUF)}")
    parser.add_argument("--peers", type=names, default=PEERS, help=f"of {','.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "mixtral-bench-models")
    parser.add_argument("--record", action="store_true", help="write benchmarks/records/<date>-<device>-model.json")
    arguments = parser.parse_args()
    for option, known in (("models", SHAPES), ("dtypes", GGUF), ("peers", PEERS)):
        if unknown := set(getattr(arguments, option)) - set(known):
            parser.error(f"--{option}: expected names among {', '.join(known)}, got {', '.join(sorted(unknown))}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    bench = Bench("model", "cpu")
    available = set()
    for peer in arguments.peers:
        if missing := missing_packages(peer):
            print(f"{peer}: its rows stay empty, these packages are not installed: {', '.join(missing)}")
        else:
            available.add(peer)
            bench.versions[peer] = importlib.metadata.version(PACKAGES[peer])
    for model in arguments.models:
        for dtype in arguments.dtypes:
            # transformers has no int8 or int4 of its own.
            peers = [peer for peer in arguments.peers if dtype == "bfloat16" or peer != "transformers"]
            bench.rows += run_case(model, dtype, peers, available, arguments)
    for row in bench.rows:
        show(row)
    if arguments.record:
        bench.write()


if __name__ == "__main__":
    main()
