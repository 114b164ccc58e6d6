"""A run small enough for tests: text of a few words, a configuration, and the command in a process of its own."""

import os
import random
import subprocess
import sys
from pathlib import Path

import torch

from mixtral.train import Mixtral
from mixtral.train.loop import Outcome, run
from mixtral.train.parallel import Ranks
from mixtral.train.settings import OutputSettings, Settings
from mixtral.train.toml_tables import parse

ROOT = Path(__file__).resolve().parents[2]
DEMO_TOKENIZER = ROOT / "models" / "demo" / "tokenizer.model"
WORDS = "the of and king water said unto him table index query row select from where land people house day came".split()

CONFIG = """\
[model]
hidden_size = 32
intermediate_size = 32
num_layers = 2
num_heads = 2
num_experts = 4
window = 16

[data]
tokenizer = "tokenizer"

[data.domains.a]
files = ["a.jsonl"]
held_out_share = 0.1

[data.domains.b]
files = ["b*.txt"]
held_out = ["held_out.txt"]
weight = 2

[train]
steps = 8
tokens_per_step = 192
context = 48
lr = 3e-3
min_lr = 3e-4
threads = 1

[output]
folder = "out"
checkpoint_every = 4
"""


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def write_corpus(folder: Path) -> Path:
    """Files of two domains, a tokenizer of 320 pieces, and the configuration; returns the configuration."""
    import json

    from mixtral.train.tokenizer_training import train_tokenizer, write_tokenizer

    rng = random.Random(0)
    documents = [sentence(rng, rng.randint(3, 60)) for _ in range(40)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    for name in ("b1.txt", "b2.txt", "held_out.txt"):
        (folder / name).write_text(sentence(rng, 50) + " 0123456789\n")
    write_tokenizer(folder / "tokenizer", train_tokenizer([*documents, "0 1 2 3 4 5 6 7 8 9"], 320), 48)
    (folder / "config.toml").write_text(CONFIG)
    return folder / "config.toml"


def settings(out: Path, **train: object) -> Settings:
    """Settings for ``loop.run`` without the command; ``train`` replaces keys of [train]."""
    options = {"steps": 6, "tokens_per_step": 64, "lr": 3e-3, "min_lr": 3e-4} | train
    found = parse(Settings, {"train": options}, "test")
    found.output = OutputSettings(folder=str(out), checkpoint_every=2, keep=2)
    return found


def mixtral_train(*arguments: object, before: str = "", ranks: int = 1, **options) -> subprocess.CompletedProcess:
    """``mixtral train`` in a process, or in several under torchrun; ``before`` is code that runs first."""
    program = f"{before}\nfrom mixtral.__main__ import main\nmain()"
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'python'}:{ROOT / 'tests' / 'train'}"}
    script = Path(options.pop("script", "/dev/null"))
    if ranks > 1:
        script.write_text(program)
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(script)]
        command = [sys.executable, *torchrun, "train", *map(str, arguments)]
    else:
        command = [sys.executable, "-c", program, "train", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, **options)


def tensors_of(out: Path) -> dict[str, torch.Tensor]:
    """The tensors of the last checkpoint."""
    from mixtral.train import checkpoint

    return checkpoint.load(checkpoint.paths(out)[-1])[0]


def assert_same_run(one: Path, other: Path) -> None:
    """Equal bits in the last checkpoint, and equal metrics but for the clock."""
    from mixtral.train import metrics

    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    clock = {"seconds", "tokens_per_second", "flops_per_second", "memory_bytes"}
    rows = [[{k: v for k, v in row.items() if k not in clock} for row in metrics.read(out)] for out in (one, other)]
    assert rows[0] == rows[1]


def run_tiny(model: Mixtral, batches: object, found: Settings, resume: bool = False, **options: object) -> Outcome:
    return run(model, batches, found.train, found.output, identity={"seed": 0}, resume=resume, ranks=Ranks(), **options)
