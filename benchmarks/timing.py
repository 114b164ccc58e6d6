"""Timing: functions take turns (A B A B ...) and medians count.

On CUDA each function is captured once and replayed as a graph, as decoding does, and finds nothing of use in the L2
cache, as in a model, whose other layers have passed through it since.
"""

import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

FEWEST_ROUNDS = {"cpu": 3, "cuda": 50}
MOST_ROUNDS = 200
FLUSH_BYTES = 256 * 2**20  # five times the L2 cache of an H100


@dataclass(frozen=True)
class Sample:
    """What the rounds of one function come to."""

    seconds: float  # median
    variation: float  # standard deviation over mean


class CpuTimer:
    """Wall time of a call."""

    def __init__(self, function: Callable) -> None:
        self._function = function
        function()  # warms up

    def seconds(self) -> float:
        start = time.perf_counter()
        self._function()
        return time.perf_counter() - start


class CudaTimer:
    """GPU time of a graph replay, cold. A function that synchronises with the host cannot be captured: it raises."""

    def __init__(self, function: Callable) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # workspaces, lazy modules and compilation come before the capture
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            function()
        # Read, not written: dirty lines would have to be written back while the function is timed.
        self._flush = torch.zeros(FLUSH_BYTES // 4, device="cuda")
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(self) -> float:
        self._flush.sum()  # long enough that the graph is queued before the GPU is free for it
        self._begin.record()
        self._graph.replay()
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1e3


TIMERS = {"cpu": CpuTimer, "cuda": CudaTimer}


def take_turns(functions: dict[str, Callable], device: str, budget: float = 1.0) -> dict[str, Sample]:
    """Time each function for about ``budget`` seconds together, and no fewer than ``FEWEST_ROUNDS``."""
    timers = {name: TIMERS[device](function) for name, function in functions.items()}
    once = sum(timer.seconds() for timer in timers.values())
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(max(FEWEST_ROUNDS[device], min(MOST_ROUNDS, int(budget / max(once, 1e-6))))):
        for name, timer in timers.items():
            seconds[name].append(timer.seconds())
    return {
        name: Sample(statistics.median(s), statistics.pstdev(s) / statistics.mean(s)) for name, s in seconds.items()
    }


def warm_memory(path: Path) -> None:
    """Use as much memory as the model in ``path``, a file or a folder, has bytes, and free it: in a virtual machine,
    memory that the host has to provide first takes many times as long, and that would count as loading."""
    files = path.iterdir() if path.is_dir() else [path]
    torch.ones(int(1.2 * sum(file.stat().st_size for file in files)) // 4)


def gpu_state() -> dict[str, str]:
    """What decides how fast this GPU is today; asked right after a run, while its clock is still that of the run."""
    query = {"driver": "driver_version", "SM clock": "clocks.sm", "power cap": "power.limit"}
    uuid = torch.cuda.get_device_properties().uuid
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(query.values())}"]
    answer = subprocess.run([*command, "--format=csv,noheader"], capture_output=True, text=True, check=True).stdout
    return dict(zip(query, map(str.strip, answer.split(",")), strict=True))
