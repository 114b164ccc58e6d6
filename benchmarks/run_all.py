"""Writes the records of all ops and of the model, on the CPU a small one, on CUDA 8 layers of Mixtral 8x7B.

It ends within ``--minutes``: what does not fit is said to have failed.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
CPU_ONLY = {
    "bench_activity.py",
    "bench_bridge.py",
    "bench_engine.py",
    "bench_long_context.py",
    "bench_moe_mlp_training.py",
    "bench_pack_weight.py",
    "bench_parallel.py",
    "bench_passkey.py",
    "bench_routing.py",
    "bench_system.py",
    "bench_trace.py",
    "bench_train.py",
    "bench_weight_kernels.py",
}
MODEL = {
    "cpu": ["--models", "small", "--isa", "native,avx2", "--measures", "prefill 512,decode,decode batch 8"],
    "cuda": ["--layers", "8"],
}


def commands(device: str, llama_avx2: Path | None = None) -> list[list[str]]:
    """One for each benchmark, file and options; the model and the expert layer first."""
    llama = ["--llama-avx2", str(llama_avx2)] if llama_avx2 else []
    first = [["bench_model.py", *MODEL[device], *llama], ["bench_moe_mlp.py"]]
    done = {command[0] for command in first} | (CPU_ONLY if device == "cuda" else set())
    files = sorted(path.name for path in FOLDER.glob("bench_*.py") if path.name not in done)
    return [[*command, "--device", device, "--record"] for command in first + [[file] for file in files]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=list(MODEL))
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--llama-avx2", type=Path, help="as bench_model.py takes it")
    arguments = parser.parse_args()
    begin = time.monotonic()
    failed, runs = [], commands(arguments.device, arguments.llama_avx2)
    for n, command in enumerate(runs, start=1):
        elapsed = time.monotonic() - begin
        print(f"[{n}/{len(runs)}, {elapsed:.0f} s] {' '.join(command)}", flush=True)
        left = max(0.0, 60 * arguments.minutes - elapsed)
        try:
            subprocess.run([sys.executable, FOLDER / command[0], *command[1:]], check=True, timeout=left)
        except subprocess.SubprocessError as error:
            failed.append(command[0])
            print(error, flush=True)
    print(f"done in {time.monotonic() - begin:.0f} s")
    if failed:
        sys.exit(f"run_all: {len(failed)} of {len(runs)} benchmarks failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
