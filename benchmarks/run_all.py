"""Writes the records of all ops and of the model, on the CPU without AMX, on CUDA with 8 layers of Mixtral 8x7B.

Each benchmark gets a limit; together they take less than 15 minutes. ``bench_model.py --record`` takes longer and is
a command of its own.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
OPS = sorted(path.name for path in FOLDER.glob("bench_*.py") if path.name != "bench_model.py")
CPU_ONLY = {"bench_pack_weight.py"}
MODEL = {
    "cpu": ["--isa", "avx2,avx512_bf16", "--models", "mini,mid", "--rounds", "3", "--seconds", "20"],
    "cuda": ["--layers", "8"],
}
LIMITS = {"bench_moe_mlp.py": 100, "bench_model.py": 300}  # seconds
LIMIT = 60


def commands(device: str) -> list[list[str]]:
    """One for each benchmark: its file and its options."""
    files = [file for file in OPS if device == "cpu" or file not in CPU_ONLY]
    return [[file, "--device", device] for file in files] + [["bench_model.py", "--device", device, *MODEL[device]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=list(MODEL))
    device = parser.parse_args().device
    failed, runs = [], commands(device)
    for n, (file, *options) in enumerate(runs, start=1):
        print(f"[{n}/{len(runs)}] {file} {' '.join(options)}", flush=True)
        start = time.perf_counter()
        try:
            subprocess.run(
                [sys.executable, FOLDER / file, *options, "--record"], check=True, timeout=LIMITS.get(file, LIMIT)
            )
        except subprocess.SubprocessError as error:
            failed.append(file)
            print(error, flush=True)
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    if failed:
        sys.exit(f"run_all: {len(failed)} of {len(runs)} benchmarks failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
