"""Timing, bounds and records: every ``bench_<op>.py`` prints one table and can write one record.

A record is ``benchmarks/records/<date>-<device>-<name>.json``; benchmarks/records/README.md says what is in it.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from roofline import bound_of, hopper_peak, rates_of
from timing import Sample, gpu_state, take_turns

RECORDS = Path(os.environ.get("MIXTRAL_RECORDS", Path(__file__).parent / "records"))
REPOSITORY = Path(__file__).parent.parent


@dataclass
class Row:
    """One measurement; higher is better in ``value`` and ``ratio``; what does not apply is None."""

    case: str
    metric: str
    value: float
    unit: str
    bound: float | None = None
    percent_of_bound: float | None = None
    peer: str | None = None
    peer_value: float | None = None
    ratio: float | None = None


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
        self,
        case: str,
        ours: Callable,
        peers: dict[str, Callable],
        *,
        gigabytes: float = 0.0,
        gflop: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
        budget: float = 1.0,
    ) -> dict[str, Sample]:
        """Let ``ours`` and the peers take turns for ``budget`` seconds; the fastest peer counts.

        Args:
            gigabytes, gflop: the least traffic and the useful arithmetic, as far as they matter.
            dtype: of that arithmetic.

        Returns:
            The samples, by the names in ``peers`` and "ours".
        """
        samples = take_turns({"ours": ours} | peers, self.device, budget)
        mine, peer = samples["ours"], min(peers, key=lambda name: samples[name].seconds)
        ratio = samples[peer].seconds / mine.seconds
        bound = bound_of(gigabytes, gflop, rates_of(self.device, dtype), self.device)
        value = bound.work / mine.seconds
        ours_cells = (case, f"median of {bound.unit}", value, bound.unit, bound.rate, 100 * value / bound.rate)
        self.rows.append(Row(*ours_cells, peer, bound.work / samples[peer].seconds, ratio))
        print(
            f"{case:58s} {1e6 * mine.seconds:10.1f} us (cv {100 * mine.variation:4.1f} %) {value:8.2f} {bound.unit:8s} "
            f"{100 * value / bound.rate:5.1f} % of bound  x {ratio:5.2f} {peer}",
            flush=True,
        )
        return samples

    def finish(self, record: bool) -> None:
        """Say, and keep with the versions, what the GPU was set to; write the record when asked."""
        if self.device == "cuda":
            self.versions |= gpu_state() | {"kernels": os.environ.get("MIXTRAL_CUDA_KERNELS", "simple")}
            print(device_name(self.device), *(f"{name} {value}" for name, value in self.versions.items()), sep=", ")
            if torch.cuda.get_device_capability() == (9, 0):
                clock = float(self.versions["SM clock"].split()[0])
                peak = hopper_peak(torch.cuda.get_device_properties().multi_processor_count, clock)
                print(f"dense bf16 at this SM clock: {peak:.0f} TFLOP/s")
        if record:
            self.write()

    def write(self, folder: Path = RECORDS) -> None:
        """Write the record ``<folder>/<date>-<device>-<name>.json``.

        Other cases that runs of the same commit have left in it stay, so that a long record can be made in parts.
        """
        date = datetime.date.today().isoformat()
        device = device_name(self.device)
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True).stdout
        record = {
            "name": self.name,
            "device": device,
            "date": date,
            "commit": os.environ.get("MIXTRAL_COMMIT", head.strip()),  # set where the tree is a copy without git
            "versions": self.versions,
        }
        rows = [asdict(row) | {"goal": None} for row in self.rows]  # a field of the format that nothing uses
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{date}-{slug}-{self.name}.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        if before.get("commit") == record["commit"]:
            cases = {row["case"] for row in rows}
            rows = [row for row in before["rows"] if row["case"] not in cases] + rows
            record["versions"] = before["versions"] | record["versions"]
        partial = path.with_suffix(".partial")
        partial.write_text(record_text(record, rows))
        partial.replace(path)  # in one step: a record that a killed run leaves is whole
        print(f"wrote {path}")


def with_backward(function: Callable, *inputs: torch.Tensor) -> Callable:
    """A call of ``function(*inputs)`` and of its backward to every input, at random gradients of the results."""

    def results() -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            out = function(*leaves)
        return out if isinstance(out, tuple) else (out,)

    leaves = [x.detach().requires_grad_() for x in inputs]
    grads = [torch.randn_like(x) for x in results()]
    return lambda: torch.autograd.grad(results(), leaves, grads)


def record_text(record: dict, rows: list[dict]) -> str:
    """JSON with one row a line."""
    head = json.dumps(record, indent=1).removesuffix("\n}")
    return head + ',\n "rows": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ]\n}\n"


def cpu_field(name: str) -> str:
    """Of the first processor in /proc/cpuinfo; empty where it has no such field."""
    match = re.search(rf"^{name}\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match.group(1) if match else ""


def device_name(device: str) -> str:
    """The GPU's own name, or the processor's, with its family where the name has no number: "AMD EPYC" is many."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = cpu_field("model name") or platform.processor()
    numbered = re.search(r"\d", name) or not cpu_field("cpu family")
    return name if numbered else f"{name} (family {cpu_field('cpu family')}, model {cpu_field('model')})"


def native_isa() -> str:
    """What MIXTRAL_CPU_ISA is by default on this processor (csrc/ops/cpu/isa.cpp)."""
    flags = set(cpu_field("flags").split())
    if not {"avx2", "fma", "f16c", "bmi2"} <= flags:
        return "baseline"
    if not {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags:
        return "avx2"
    if "amx_bf16" in flags:
        return "amx"
    return "avx512_bf16" if "avx512_bf16" in flags and cpu_field("vendor_id") != "GenuineIntel" else "avx512"


def main(name: str, run: Callable[[Bench], None], devices: tuple[str, ...] = ("cpu", "cuda")) -> None:
    """Command line of every benchmark: ``--device``, ``--threads``, ``--record``."""
    parser = argparse.ArgumentParser(description=f"Benchmark of {name}")
    parser.add_argument("--device", default=devices[-1] if torch.cuda.is_available() else "cpu", choices=devices)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--record", action="store_true", help="write benchmarks/records/<date>-<device>-<name>.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    bench = Bench(name, arguments.device)
    with torch.no_grad():
        run(bench)
    bench.finish(arguments.record)
