"""Models larger than memory: loading mapped weights, reading experts ahead, decoding with half of the memory.

A random bf16 model of 1.4 GB in the folder of `mixtral quantize`. What it has in memory is dropped before each run, and
the runs with less memory are in a control group, so they need a user who can make one. Decoding that waits for the disk
is set against the time that its disk needs for the same bytes.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from common import REPOSITORY, Bench, Row
from random_models import Shape, write_checkpoint

sys.path.append(str(REPOSITORY / "tests" / "app"))
from cgroups import memory_limit  # noqa: E402

MODEL = Shape(hidden=1024, layers=8, heads=16, kv_heads=4, head_dim=64, intermediate=3584, vocab=4096)
CONTEXT, PROMPT, TOKENS = 256, 8, 64
ENGINE = dict(ctx_size=CONTEXT, chunk_size=16, token_budget=16, max_batch=1)  # a small cache


def work(folder: Path, weights: str, read_ahead: bool, tokens: int) -> dict:
    """In a process of its own: what a decode came to."""
    import mixtral

    start = time.perf_counter()
    model = mixtral.Mixtral.from_pretrained(folder, weights=weights, read_ahead=read_ahead, **ENGINE)
    loaded, before = time.perf_counter(), disk_bytes()
    model.generate([[5 + 37 * i % 4000 for i in range(PROMPT)]], max_tokens=tokens, ignore_eos=True)
    timings = model.timings
    seconds = timings.prefill_seconds + timings.decode_seconds
    return {
        "load_seconds": loaded - start,
        "seconds": seconds,
        "tokens_per_second": (tokens - 1) / timings.decode_seconds,
        "bytes": disk_bytes() - before,
        "counts": model.expert_counts(),
    }


def disk_bytes() -> int:
    """That this process has caused to be read from disks."""
    return int(next(line for line in Path("/proc/self/io").read_text().splitlines() if "read_bytes" in line).split()[1])


def run_worker(folder: Path, *arguments: str, **options: object) -> dict:
    command = [sys.executable, __file__, "--worker", str(folder), *arguments]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, **options).stdout)


def mixtral_json(*arguments: str | Path, **options: object) -> dict:
    command = [sys.executable, "-m", "mixtral", *map(str, arguments), "--json"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, **options).stdout)


def drop_from_memory(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_into_memory(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


@contextlib.contextmanager
def packed_model() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as temporary:
        plain = write_checkpoint(MODEL, Path(temporary) / "plain")
        packed = Path(temporary) / "packed"
        command = [sys.executable, "-m", "mixtral", "quantize", plain, packed, "--dtype", "bfloat16"]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        yield packed


def show(row: Row) -> Row:
    bound = f", {row.percent_of_bound:.0f} % of {row.bound:.4g}" if row.bound else ""
    peer = f", x {row.ratio:.2f} of {row.peer}: {row.peer_value:.4g}" if row.peer else ""
    print(f"{row.case:48s} {row.metric:32s} {row.value:10.4g} {row.unit}{bound}{peer}", flush=True)
    return row


def loading(folder: Path, rounds: int) -> Row:
    """The file is in memory."""
    read_into_memory(folder)
    seconds = {}
    for weights in ("mmap", "read"):
        runs = [run_worker(folder, "--weights", weights, "--tokens", "2") for _ in range(rounds)]
        seconds[weights] = min(run["load_seconds"] for run in runs)
    mmap, read = 1 / seconds["mmap"], 1 / seconds["read"]
    return show(Row("load 1.4 GB, in memory", "models ready", mmap, "1/s", None, None, "read", read, mmap / read))


def reading_ahead(folder: Path, rounds: int) -> Row:
    """The first tokens of a model of which nothing is in memory."""
    rates: dict[str, list[float]] = {"": [], "--no-read-ahead": []}
    for _ in range(rounds):
        for flag in rates:
            drop_from_memory(folder)
            rates[flag].append(run_worker(folder, "--tokens", "17", *filter(None, [flag]))["tokens_per_second"])
    on, off = (max(rates[flag]) for flag in rates)
    return show(
        Row("nothing in memory, 16 tokens", "decode", on, "tokens/s", None, None, "no read-ahead", off, on / off)
    )


def limited(folder: Path, share: float, disk: float) -> list[Row]:
    """With memory for a share of the weights."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    case = f"memory for {100 * share:.0f} % of the weights, {TOKENS} tokens"
    with memory_limit(int(share * size)) as group:
        drop_from_memory(folder)
        flags = "--weights", "mmap", "-c", str(CONTEXT), "--chunk-size", "16"
        plan = mixtral_json("info", folder, *flags, preexec_fn=group.enter)["mapped"]
        drop_from_memory(folder)
        run = run_worker(folder, "--tokens", str(TOKENS), preexec_fn=group.enter)
        peak = group.peak()
    assert peak <= share * size
    rate, bound = run["bytes"] / run["seconds"] / 1e9, disk / 1e9
    rows = [Row(case, "read from the disk", rate, "GB/s", bound, 100 * rate / bound)]
    forecast, measured = plan["decode_tokens_per_second"], run["tokens_per_second"]
    rows.append(Row(case, "decode", measured, "tokens/s", None, None, "forecast", forecast, measured / forecast))
    print(f"  {run['bytes'] / 1e9:.2f} GB in {run['seconds']:.2f} s; experts {run['counts']}; plan {plan}")
    return [show(row) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of models larger than memory")
    parser.add_argument("--record", action="store_true", help="write benchmarks/records/<date>-<device>-offload.json")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--weights", default="mmap", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=TOKENS, help=argparse.SUPPRESS)
    parser.add_argument("--no-read-ahead", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return print(
            json.dumps(work(arguments.worker, arguments.weights, not arguments.no_read_ahead, arguments.tokens))
        )
    bench = Bench("offload", "cpu")
    with packed_model() as folder:
        bench.rows.append(loading(folder, arguments.rounds))
        bench.rows.append(reading_ahead(folder, arguments.rounds))
        disk = mixtral_json("info", folder, "--weights", "mmap", "-c", CONTEXT)["mapped"]["disk_bytes_per_second"]
        for share in (0.5, 0.75, 1.5):
            bench.rows += limited(folder, share, disk)
    bench.finish(arguments.record)


if __name__ == "__main__":
    main()
