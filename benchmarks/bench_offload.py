"""Models larger than memory: loading, reading experts ahead, decoding with half of the memory and its forecast.

A random bf16 model of 1.4 GB in the folder of `mixtral quantize`. What it has in memory is dropped before each run, and
the runs with less memory are in a control group, so they need a user who can make one. Decoding is set against the
forecast of `mixtral info`, and what it reads from the disk against what the disk can do. So is decoding beside a GPU,
in whose place memory of the CPU stands. Takes about nine minutes.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common import REPOSITORY, Bench, Row
from random_models import Shape, write_checkpoint

sys.path.append(str(REPOSITORY / "tests" / "app"))
from cgroups import memory_limit  # noqa: E402

MODEL = Shape(hidden=1024, layers=8, heads=16, kv_heads=4, head_dim=64, intermediate=3584, vocab=4096)
CONTEXT, TOKENS = 256, 64
ENGINE = dict(ctx_size=CONTEXT, chunk_size=1, token_budget=1, max_batch=1)  # a small cache


def work(folder: Path, weights: str, read_ahead: bool, tokens: int) -> dict:
    """In a process of its own: how fast random tokens go through the model, one in each pass, as in decoding."""
    import mixtral

    start = time.perf_counter()
    model = mixtral.Mixtral.from_pretrained(folder, weights=weights, read_ahead=read_ahead, **ENGINE)
    load_seconds = time.perf_counter() - start
    prompt = np.random.default_rng(0).integers(3, MODEL.vocab, tokens).tolist()
    model.generate([prompt], max_tokens=1, ignore_eos=True)
    return {"load_seconds": load_seconds, "tokens_per_second": tokens / model.timings.prefill_seconds}


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


def loading(folder: Path, rounds: int) -> list[Row]:
    """Until the model is ready, when the files are in memory and when they are not."""
    rows = []
    for case, prepare, ways in (
        ("load 1.4 GB, in memory", read_into_memory, ("mmap", "read")),
        ("load 1.4 GB, nothing in memory", drop_from_memory, ("direct", "read")),
    ):
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way in ways:
                prepare(folder)
                seconds[way].append(run_worker(folder, "--weights", way, "--tokens", "2")["load_seconds"])
        ours, peer = (1 / min(seconds[way]) for way in ways)
        rows.append(show(Row(case, f"models ready, {ways[0]}", ours, "1/s", None, None, ways[1], peer, ours / peer)))
    return rows


def reading_ahead(folder: Path, rounds: int) -> list[Row]:
    """Against what the system does by itself: the first tokens of a model of which nothing is in memory, and all tokens
    of one for which there is half of the memory. Both take turns."""
    half = sum(path.stat().st_size for path in folder.glob("*.safetensors")) // 2
    rows = []
    for case, tokens, limit in (
        ("nothing in memory, 16 tokens", 16, None),
        ("memory for 50 % of the weights, 32 tokens", 32, half),
    ):
        rates: dict[str, list[float]] = {"": [], "--no-read-ahead": []}
        for _ in range(rounds):
            for flag in rates:
                drop_from_memory(folder)
                arguments = "--tokens", str(tokens), *filter(None, [flag])
                with memory_limit(limit) if limit else contextlib.nullcontext() as group:
                    run = run_worker(folder, *arguments, preexec_fn=group and group.enter)
                rates[flag].append(run["tokens_per_second"])
        on, off = (statistics.median(rates[flag]) for flag in rates)
        rows.append(show(Row(case, "decode", on, "tokens/s", None, None, "no read-ahead", off, on / off)))
    return rows


def forecast_of(plan: dict, missing: float) -> float:
    """Tokens per second, by the formula of docs/offload.md, when a token lacks so many bytes of its experts."""
    in_memory = (plan["bytes_of_every_token"] + plan["expert_bytes_per_token"]) / plan["product_bytes_per_second"]
    return 1 / (in_memory + missing / plan["disk_bytes_per_second"])


def limited(folder: Path, share: float) -> list[Row]:
    """With memory for a share of the weights: what is measured against what `info` forecasts.

    Random tokens are what is decoded, because what random weights write by themselves soon repeats. The
    run that `bench` makes first leaves in memory what fits. The forecast takes routing as even, which no model's is,
    and experts as there or not, which are often there in part: so its formula is checked with the bytes read too.
    """
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    case = f"memory for {100 * share:.0f} % of the weights, {TOKENS} tokens"
    flags = "--weights", "mmap", "-c", CONTEXT, "--chunk-size", 1
    with memory_limit(int(share * size)) as group:
        drop_from_memory(folder)
        plan = mixtral_json("info", folder, *flags, preexec_fn=group.enter)["mapped"]
        sizes = "--prompt-tokens", TOKENS, "--new-tokens", 2, "--repeat", 1
        run = mixtral_json("bench", folder, *flags, *sizes, preexec_fn=group.enter)
        peak = group.peak()
    assert peak <= share * size
    measured, forecast = run["prefill_tokens_per_second"], plan["decode_tokens_per_second"]
    rows = [Row(case, "decode", measured, "tokens/s", None, None, "forecast", forecast, measured / forecast)]
    counts, disk = run["expert_counts"], plan["disk_bytes_per_second"]
    hits = counts["hits"] / (counts["hits"] + counts["misses"])
    missing = counts["bytes"] / (TOKENS + 1)
    known = forecast_of(plan, missing)
    rows.append(
        Row(case, "decode", measured, "tokens/s", None, None, "forecast that knows the bytes", known, measured / known)
    )
    print(f"  {100 * hits:.0f} % of the choices in memory, forecast {100 * plan['resident_share_of_experts']:.0f} %")
    if plan["resident_share_of_experts"] < 1:
        rate = missing * measured / 1e9
        rows.append(Row(case, "read from the disk", rate, "GB/s", disk / 1e9, 100 * rate / (disk / 1e9)))
    return [show(row) for row in rows]


def beside_a_gpu(folder: Path, share: float, rounds: int) -> list[Row]:
    """With a share of the experts on a simulated GPU: what is measured against what `info --gpu-memory` forecasts.

    Forecast and measurement take turns, because other work on the machine makes both slower. Routing of random
    weights is not even, so the formula is checked with the misses that were counted too.
    """
    flags = "--simulate-gpu", "-c", CONTEXT
    plan = mixtral_json("info", folder, *flags, "--gpu-memory", "1TiB")["offload"]
    others = plan["fixed_bytes"] + plan["activations_bytes"] + plan["staging_bytes"]
    memory = others + int(share * plan["gpu_experts"]) * plan["expert_bytes"]
    sizes = "--prompt-tokens", 1, "--new-tokens", TOKENS, "--repeat", 1
    measured, forecasts, known = [], [], []
    for _ in range(rounds):
        plan = mixtral_json("info", folder, *flags, "--gpu-memory", memory)["offload"]
        run = mixtral_json("bench", folder, *flags, *sizes, "--gpu-memory", memory)
        counts, choices = run["expert_counts"], plan["hits_per_token"] + plan["misses_per_token"]
        assert counts["hits"] + counts["misses"] == choices * TOKENS
        hits, misses = (counts[name] / TOKENS for name in ("hits", "misses"))
        measured.append(run["decode_tokens_per_second"])
        forecasts.append(plan["decode_tokens_per_second"])
        known.append(1 / (plan["fixed_seconds"] + hits * plan["hit_seconds"] + misses * plan["miss_seconds"]))
    print(f"  {misses:.1f} misses a token, forecast {plan['misses_per_token']:.1f}")
    case = f"{100 * share:.0f} % of the experts on a simulated GPU"
    ours = statistics.median(measured)
    rows = []
    for peer, values in (("forecast", forecasts), ("forecast that knows the misses", known)):
        theirs = statistics.median(values)
        rows.append(show(Row(case, "decode", ours, "tokens/s", None, None, peer, theirs, ours / theirs)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of models larger than memory")
    parser.add_argument("--record", action="store_true", help="write benchmarks/records/<date>-<device>-offload.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gpu-only", action="store_true", help="the part beside a simulated GPU alone; no record")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--weights", default="mmap", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=TOKENS, help=argparse.SUPPRESS)
    parser.add_argument("--no-read-ahead", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return print(
            json.dumps(work(arguments.worker, arguments.weights, not arguments.no_read_ahead, arguments.tokens))
        )
    if arguments.gpu_only and arguments.record:
        parser.error("a record is of all parts: --gpu-only makes none")
    bench = Bench("offload", "cpu")
    with packed_model() as folder:
        if not arguments.gpu_only:
            bench.rows += loading(folder, arguments.rounds)
            bench.rows += reading_ahead(folder, arguments.rounds)
            for share in (0.5, 0.75, 1.5):
                bench.rows += limited(folder, share)
        for share in (0.25, 0.5, 0.75):
            bench.rows += beside_a_gpu(folder, share, arguments.rounds)
    bench.finish(arguments.record)


if __name__ == "__main__":
    main()
