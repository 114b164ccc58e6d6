"""What the system around a model costs: reading its files, pages, threads, a core that does other work.

Loading is set against reading the files from the page cache, for each type of weights. The best of some rounds counts,
each after memory was used: in a virtual machine, memory that the host has to provide first takes many times as long.
Decoding is measured with 1, 2 and more threads, on idle cores and with one busy; the median counts.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import Bench, Row, native_isa
from random_models import SHAPES, quantised_checkpoint, write_checkpoint
from timing import warm_memory

TYPES = ("int8", "fp8", "int4")
POLICIES = {"": {}, ", OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"}}
BLOCK = bytearray(2**20)


def small_pages() -> None:
    """No transparent huge pages for this process and those that it becomes."""
    ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE


def mixtral(*arguments: str | Path, **options: object) -> str:
    """What the command prints."""
    command = [sys.executable, "-m", "mixtral", *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, **options).stdout


def bench(folder: Path, *arguments: str, **options: object) -> dict:
    return json.loads(mixtral("bench", folder, "--json", *arguments, **options))


def read_files(folder: Path) -> float:
    """Seconds to read() all weights into a buffer that the cache holds."""
    start = time.perf_counter()
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(BLOCK):
                pass
    return time.perf_counter() - start


def loading_row(case: str, folder: Path, dtype: str, rounds: int, **options: object) -> Row:
    """Rates are those of the file's bytes."""
    gigabytes = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9
    read, load = [], []
    for _ in range(rounds):
        read.append(read_files(folder))
        warm_memory(folder)
        arguments = "--prompt-tokens", "1", "--new-tokens", "2", "--repeat", "1", "--dtype", dtype
        load.append(bench(folder, *arguments, **options)["load_seconds"])
    rate, bound = gigabytes / min(load), gigabytes / min(read)
    return Row(case, "loading", rate, "GB/s", bound, 100 * rate / bound)


def thread_rows(folder: Path, rounds: int) -> list[Row]:
    """Decoding; the peer is the same number of threads on idle cores."""
    rates: dict[tuple[int, str, bool], list[float]] = {}
    counts = (1, os.cpu_count(), 2 * os.cpu_count())
    for _ in range(rounds):
        for busy in (False, True):
            spinner = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
            try:
                for policy, environment in POLICIES.items():
                    for count in counts:
                        options = (
                            "--prompt-tokens",
                            "32",
                            "--new-tokens",
                            "32",
                            "--repeat",
                            "2",
                            "--threads",
                            str(count),
                        )
                        result = bench(folder, *options, env=os.environ | environment)
                        rates.setdefault((count, policy, busy), []).append(result["decode_tokens_per_second"])
            finally:
                if spinner:
                    spinner.kill()
                    spinner.wait()
    rows = []
    for (count, policy, busy), samples in rates.items():
        case = f"{count} threads{', one core busy' if busy else ''}{policy}"
        value, idle = statistics.median(samples), statistics.median(rates[count, policy, False])
        peer = ("idle cores", idle, value / idle) if busy else (None, None, None)
        rows.append(Row(case, "decode int8", value, "tokens/s", None, None, *peer))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="small", choices=SHAPES)
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "mixtral-bench-models")
    parser.add_argument("--record", action="store_true", help="write benchmarks/records/<date>-<device>-system.json")
    arguments = parser.parse_args()
    record = Bench("system", "cpu")
    record.versions["instruction set"] = native_isa()
    source = write_checkpoint(SHAPES[arguments.model], arguments.folder / arguments.model)
    quantised = {dtype: quantised_checkpoint(source, dtype) for dtype in TYPES}
    cases = [("bfloat16", source, "bfloat16")]
    cases += [(f"{dtype}, quantised while reading", source, dtype) for dtype in TYPES]
    cases += [(f"{dtype}, written by quantize", folder, dtype) for dtype, folder in quantised.items()]
    for case, folder, dtype in cases:
        record.rows.append(loading_row(f"{arguments.model} {case}", folder, dtype, arguments.rounds))
        print(record.rows[-1], flush=True)
    case = f"{arguments.model} bfloat16, small pages"
    record.rows.append(loading_row(case, source, "bfloat16", arguments.rounds, preexec_fn=small_pages))
    record.rows += thread_rows(quantised["int8"], arguments.rounds)
    for row in record.rows:
        print(row)
    record.finish(arguments.record)


if __name__ == "__main__":
    main()
