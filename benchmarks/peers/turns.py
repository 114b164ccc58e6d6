"""What engines of the whole-model benchmark are asked to do, and the turns in which they do it."""

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peers.engines import Worker
from roofline import measure_fma_peak, measure_read_bandwidth
from timing import warm_memory

PEERS = ("transformers", "llama.cpp")
EXPERTS = {"transformers": ["eager", "grouped_mm"]}  # its better implementation counts


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


@dataclass
class Turns:
    """What engines that took turns did: rates in tokens/s by engine, measure and experts implementation."""

    rates: dict[tuple[str, str], dict[str, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    load_seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: dict[str, float] = field(default_factory=dict)
    bandwidth: list[float] = field(default_factory=list)  # GB/s read, once a round
    fma_peak: list[float] = field(default_factory=list)  # GFLOP/s of f32, once a round

    def rate(self, engine: str, measure: str) -> float | None:
        """The median of the engine's best implementation; None when it was not asked."""
        implementations = self.rates.get((engine, measure), {})
        return max(map(statistics.median, implementations.values()), default=None)


def run_turns(
    engines: dict[str, Path],
    dtype: str,
    threads: int,
    rounds: int,
    seconds: float,
    isa: str,
    environment: dict[str, str],
    measures: Sequence[Measure],
) -> Turns:
    """Load every engine and let them take turns.

    Args:
        engines: name -> its model's path.
        rounds, seconds: no round starts when either is used up, but the first one always does.
        isa: that the peak of f32 is measured with.
        environment: variables that all engines get.
    """
    turns, workers = Turns(), []
    try:
        for engine, path in engines.items():
            warm_memory(path)
            workers.append(Worker(engine, path, dtype, threads, environment))
            turns.load_seconds[engine] = workers[-1].load_seconds
            print(f"  {engine}: loaded in {workers[-1].load_seconds:.1f} s", flush=True)
            workers[-1].ask("decode", batch=1, prompt=16, steps=2)  # warms up
        start = time.perf_counter()
        for n in range(rounds):
            if n > 0 and time.perf_counter() - start > seconds:
                break
            turns.bandwidth.append(measure_read_bandwidth("cpu"))
            turns.fma_peak.append(measure_fma_peak(threads, isa))
            for measure in measures:
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
