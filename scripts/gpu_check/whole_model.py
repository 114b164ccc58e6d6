"""Whole models through the binary: what CUDA computes is what the CPU computes. ``whole_model.py [--dry-run]``.

The demo model in f32 gives the same tokens; it, and a random one with the head size of Mixtral, give nearly the same
loss in bf16. ``--dry-run`` compares the CPU with itself. Exit status 0, or 3 if the devices differ.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from random_models import Shape, write_checkpoint
from runner import WRONG
from stages import BINARY, ROOT

DEMO = ROOT / "models" / "demo"
RANDOM = Shape(hidden=256, layers=2, heads=8, kv_heads=2, head_dim=128, intermediate=512, vocab=4096)
LOSS_DIFFERENCE = 0.01  # nats a token; other rounding of bf16 changes which experts near ties get


def run(*arguments: object) -> dict:
    """The JSON that ``mixtral`` prints. Where it was built elsewhere, it has to be told where the libraries are."""
    libraries = f"{ROOT / 'python' / 'mixtral'}:{Path(torch.__file__).parent / 'lib'}"
    done = subprocess.run(
        [BINARY, *map(str, arguments), "--json"],
        stdout=subprocess.PIPE,
        check=True,
        env=os.environ | {"LD_LIBRARY_PATH": libraries},
    )
    return json.loads(done.stdout)


def tokens(device: str) -> list[int]:
    options = ["--dtype", "float32", "-n", 48, "--ignore-eos", "-p", "Once upon a time"]
    return run("generate", DEMO, "--device", device, *options)["token_ids"]


def loss(model: Path, text: Path, device: str, chunk: int) -> float:
    """In bf16; a chunk of one token is a decoding step."""
    return run("perplexity", model, text, "--device", device, "--chunk-size", chunk)["nats_per_token"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true")
    other = "cpu" if parser.parse_args().dry_run else "cuda"
    good = tokens("cpu") == tokens(other)
    print(f"demo, float32: 48 tokens on cpu and {other} {'are the same' if good else 'DIFFER'}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text"
        text.write_text((ROOT / "README.md").read_text()[:4000])
        random = write_checkpoint(RANDOM, Path(folder) / "random")
        for file in DEMO.glob("tokenizer*"):
            shutil.copy(file, random)
        for name, model in (("demo", DEMO), ("random", random)):
            for chunk in (512, 1):
                on = {device: loss(model, text, device, chunk) for device in ("cpu", other)}
                good &= abs(on["cpu"] - on[other]) <= LOSS_DIFFERENCE
                print(f"{name}, bfloat16, {chunk} tokens a pass: nats a token on {on}", flush=True)
    return 0 if good else WRONG


if __name__ == "__main__":
    sys.exit(main())
