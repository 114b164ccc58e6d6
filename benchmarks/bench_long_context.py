"""Decoding at the end of a long context, with and without a window, against reading weights and cache from memory.

The shape ``small`` in bf16, under the processor's instruction set and held to AVX2. The prompt is computed once, which
takes minutes, and kept in a file that every measured process goes on from. The median of some rounds counts.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import mixtral
from common import Bench, Row, main, native_isa
from random_models import BYTES_PER_WEIGHT, SHAPES, write_checkpoint

SHAPE, DTYPE = SHAPES["small"], "bfloat16"
CONTEXT, NEW_TOKENS, ROUNDS = 32000, 24, 5
PROMPT = [5 + 7 * i % 31000 for i in range(CONTEXT)]
WINDOWS = (0, 4096)


def with_window(folder: Path, window: int, out: Path) -> Path:
    """The same checkpoint with another window; weights are linked."""
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).symlink_to(path.resolve())
    (out / "config.json").unlink()
    config = json.loads((folder / "config.json").read_text()) | {
        "sliding_window": window or None,
        "max_position_embeddings": 2 * CONTEXT,
    }
    (out / "config.json").write_text(json.dumps(config))
    return out


def prompt_cache(model: Path, path: Path) -> Path:
    """The keys and values of the prompt, in a file."""
    if not path.exists():
        runner = mixtral.Mixtral.from_pretrained(model)
        runner.generate([PROMPT], max_tokens=1)
        runner.save_prompt_cache(PROMPT, path)
    return path


def decode(model: str, cache: str) -> None:
    """Of a measured process: prints tokens/s after the prompt, and the rate of reading memory beside it, in bytes/s."""
    runner = mixtral.Mixtral.from_pretrained(model)
    rates = []
    runner.load_prompt_cache(cache)
    for _ in range(ROUNDS):
        runner.generate([[*PROMPT, 7]], max_tokens=NEW_TOKENS + 1, ignore_eos=True)
        rates.append(NEW_TOKENS / runner.timings.decode_seconds)
    bench = [sys.executable, "-m", "mixtral", "bench", model, "--prompt-tokens", "8", "--new-tokens", "8", "--json"]
    memory = json.loads(subprocess.run(bench, stdout=subprocess.PIPE, check=True).stdout)
    print(json.dumps([statistics.median(rates), memory["read_bandwidth_bytes_per_second"]]))


def decode_row(model: Path, cache: Path, isa: str, window: int) -> Row:
    process = subprocess.run(
        [sys.executable, __file__, "--decode", model, cache],
        stdout=subprocess.PIPE,
        check=True,
        env=os.environ | {"MIXTRAL_CPU_ISA": isa},
    )
    value, bandwidth = json.loads(process.stdout)
    read = SHAPE.weights_per_token * BYTES_PER_WEIGHT[DTYPE] + SHAPE.cache_bytes(min(CONTEXT, window or CONTEXT))
    bound = bandwidth / read
    case = f"small {DTYPE} {isa}, context {CONTEXT}, {f'window {window}' if window else 'no window'}"
    print(f"{case}: {value:.1f} tokens/s, {100 * value / bound:.0f} % of reading weights and cache", flush=True)
    return Row(case, "decode", value, "tokens/s", bound, 100 * value / bound)


def run(bench: Bench) -> None:
    models = Path(tempfile.gettempdir()) / "mixtral-bench-models"
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_checkpoint(SHAPE, models / "small")
        for window in WINDOWS:
            model = with_window(folder, window, Path(scratch) / str(window))
            cache = prompt_cache(model, models / f"small-context-{CONTEXT}-window-{window}.cache")
            for isa in dict.fromkeys((native_isa(), "avx2")):
                bench.rows.append(decode_row(model, cache, isa, window))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--decode"]:
        decode(*sys.argv[2:])
    else:
        main("long_context", run, devices=("cpu",))
