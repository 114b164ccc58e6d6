"""Passkey retrieval of the bundled model, and of a small one without a window: the share of keys that is found.

The second is trained here, in some minutes, by the configurations of the first (models/demo.toml) with other settings;
`python scripts/demo_data.py` writes their texts. No speed is measured. Logs go to build/passkey/.
"""

import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import mixtral
from common import REPOSITORY, Bench, Row, main
from mixtral import long_context

LENGTHS = [128, 160, 192, 256, 320, 384, 448, 512]  # tokens; 512 is the context of the training
OUT = REPOSITORY / "build" / "passkey"
DEPTHS, TRIALS = 11, 10


def train(config: str, out: str, *settings: str) -> Path:
    """A finished run of `mixtral train`; a folder of an earlier one is taken as it is."""
    folder = OUT / out
    if not (folder / "model.safetensors").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        flags = [word for setting in settings for word in ("--set", setting)]
        command = [sys.executable, "-m", "mixtral", "train", f"models/{config}.toml", "--out", str(folder), *flags]
        print(f"training {folder}", flush=True)
        with (OUT / f"{out}.log").open("w") as log:
            subprocess.run(command, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, check=True)
    return folder


def without_window() -> Path:
    lookups = train("demo_lookups", "lookups", "model.window=0")
    return train(
        "demo",
        "model",
        f'model.from="{lookups}"',
        "data.passkeys=0.5",
        "data.passkey_context=512",
        "train.tokens=4000000",
    )


def found(model: Path) -> tuple[dict, list[dict]]:
    result = long_context.passkey(mixtral.Mixtral.from_pretrained(model), LENGTHS, DEPTHS, TRIALS)
    return result, result["cells"]


def share(cells: list[dict]) -> float:
    return 100 * sum(cell["correct"] for cell in cells) / sum(cell["trials"] for cell in cells)


def run(bench: Bench) -> None:
    result, cells = found(REPOSITORY / "models" / "demo")
    window, reach = result["window"], result["reach"]
    whole = window - 8  # farther away the first digit has left the window when the last are asked for
    groups = {
        f"distance <= W - 8 = {whole}": [c for c in cells if c["distance"] <= whole],
        f"W - 8 < distance <= L (W - 1) = {reach}": [c for c in cells if whole < c["distance"] <= reach],
        f"distance > L (W - 1) = {reach}": [c for c in cells if c["distance"] > reach],
    }
    for name, group in groups.items():
        if group:
            bench.rows.append(Row(f"bundled model, {name}", "keys found", share(group), "%"))
    by_length = defaultdict(list)
    for cell in found(without_window())[1]:
        by_length[cell["length"]].append(cell)
    for length, group in by_length.items():
        bench.rows.append(Row(f"no window, {length} tokens", "keys found", share(group), "%"))
    for row in bench.rows:
        print(f"{row.case}: {row.value:.1f} % of the keys", flush=True)


if __name__ == "__main__":
    main("passkey", run, devices=("cpu",))
