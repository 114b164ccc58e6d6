"""Timing, bounds and records: every ``bench_<op>.py`` prints one table and can write one record.

A record is ``benchmarks/records/<date>-<device>-<name>.json``; see docs/numerics.md for the fields.
"""

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

RECORDS = Path(__file__).parent / "records"
REPOSITORY = Path(__file__).parent.parent


@dataclass
class Row:
    """One measurement; higher is better in ``value`` and ``ratio``; what does not apply is None.

    The goal is one for the ratio where there is a peer, else for the percentage of the bound where there is a bound,
    else for the value.
    """

    case: str
    metric: str
    value: float
    unit: str
    bound: float | None = None
    percent_of_bound: float | None = None
    peer: str | None = None
    peer_value: float | None = None
    ratio: float | None = None
    goal: float | None = None


@dataclass
class Bench:
    """Rows of one run on one device."""

    name: str
    device: str
    rows: list[Row] = field(default_factory=list)
    versions: dict[str, str] = field(
        default_factory=lambda: {"torch": torch.__version__, "python": platform.python_version()}
    )

    def compare(
        self, case: str, ours: Callable, peer: Callable, peer_name: str, *, gigabytes: float = 0.0, gflop: float = 0.0
    ) -> None:
        """Time ``ours`` and ``peer`` in turn and keep the median rates.

        The metric is GFLOP/s where ``gflop`` is given, GB/s where ``gigabytes`` (the least traffic) is.
        """
        mine, theirs = interleaved_seconds(ours, peer, self.device)
        work, unit = (gflop, "GFLOP/s") if gflop else (gigabytes, "GB/s")
        bound = None if gflop else read_bandwidth(self.device)
        value = work / mine
        self.rows.append(
            Row(
                case,
                f"median of {unit}",
                value,
                unit,
                bound,
                bound and 100 * value / bound,
                peer_name,
                work / theirs,
                theirs / mine,
            )
        )
        bound_text = f"{100 * value / bound:5.1f} % of bound" if bound else ""
        ours_text = f"{1e6 * mine:10.1f} us {value:9.1f} {unit:8s} {bound_text:18s}"
        print(f"{case:44s} {ours_text} x {theirs / mine:.2f} {peer_name}")

    def write(self, folder: Path = RECORDS) -> None:
        """Write the record ``<folder>/<date>-<device>-<name>.json``."""
        date = datetime.date.today().isoformat()
        device = device_name(self.device)
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True).stdout
        record = {
            "name": self.name,
            "device": device,
            "date": date,
            "commit": os.environ.get("MIXTRAL_COMMIT", head.strip()),  # set where the tree is a copy without git
            "versions": self.versions,
            "rows": [asdict(row) for row in self.rows],
        }
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{date}-{slug}-{self.name}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {path}")


def device_name(device: str) -> str:
    """The processor's or GPU's own name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return match.group(1) if match else platform.processor()


def _seconds(function: Callable, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved_seconds(a: Callable, b: Callable, device: str, budget: float = 1.0) -> tuple[float, float]:
    """Median seconds of ``a`` and ``b``, run in turn (A B A B ...) for about ``budget`` seconds after a warm-up."""
    once = _seconds(a, device) + _seconds(b, device)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(max(5, min(200, int(budget / max(once, 1e-6))))):
        times[0].append(_seconds(a, device))
        times[1].append(_seconds(b, device))
    return statistics.median(times[0]), statistics.median(times[1])


_bandwidth: dict[str, float] = {}


def measure_read_bandwidth(device: str) -> float:
    """Memory read rate in GB/s: the median of summing a buffer far larger than the caches."""
    buffer = torch.ones(256 * 2**20, dtype=torch.float32, device=device)
    buffer.sum()
    seconds = statistics.median(_seconds(buffer.sum, device) for _ in range(5))
    return buffer.numel() * 4 / seconds / 1e9


def read_bandwidth(device: str) -> float:
    """``measure_read_bandwidth``, once in a process."""
    if device not in _bandwidth:
        _bandwidth[device] = measure_read_bandwidth(device)
    return _bandwidth[device]


def main(name: str, run: Callable[[Bench], None]) -> None:
    """Command line of every benchmark: ``--device``, ``--threads``, ``--record``."""
    parser = argparse.ArgumentParser(description=f"Benchmark of {name}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--record", action="store_true", help="write benchmarks/records/<date>-<device>-<name>.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bench = Bench(name, arguments.device)
    with torch.no_grad():
        run(bench)
    if arguments.record:
        bench.write()
