"""Decoding at the end of a long context, with and without a window, against reading weights and cache from memory.

The shape ``small`` in bf16, under the processor's instruction set and held to AVX2. The prompt takes a minute or more.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import Bench, Row, main, native_isa
from random_models import BYTES_PER_WEIGHT, SHAPES, write_checkpoint

SHAPE, DTYPE = SHAPES["small"], "bfloat16"
CONTEXT, NEW_TOKENS = 32000, 48
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


def decode_row(folder: Path, isa: str, window: int) -> Row:
    work = ["--prompt-tokens", str(CONTEXT), "--new-tokens", str(NEW_TOKENS), "--repeat", "1", "--json"]
    command = [sys.executable, "-m", "mixtral", "bench", str(folder), "--dtype", DTYPE, *work]
    environment = os.environ | {"MIXTRAL_CPU_ISA": isa}
    result = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment).stdout)
    read = SHAPE.weights_per_token * BYTES_PER_WEIGHT[DTYPE] + SHAPE.cache_bytes(min(CONTEXT, window or CONTEXT))
    value, bound = result["decode_tokens_per_second"], result["read_bandwidth_bytes_per_second"] / read
    case = f"small {DTYPE} {isa}, context {CONTEXT}, {f'window {window}' if window else 'no window'}"
    print(f"{case}: {value:.1f} tokens/s, {100 * value / bound:.0f} % of reading weights and cache", flush=True)
    return Row(case, "decode", value, "tokens/s", bound, 100 * value / bound)


def run(bench: Bench) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_checkpoint(SHAPE, Path(tempfile.gettempdir()) / "mixtral-bench-models" / "small")
        for window in WINDOWS:
            model = with_window(folder, window, Path(scratch) / str(window))
            for isa in dict.fromkeys((native_isa(), "avx2")):
                bench.rows.append(decode_row(model, isa, window))


if __name__ == "__main__":
    main("long_context", run, devices=("cpu",))
