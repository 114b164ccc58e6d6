"""Small models with the bundled model's tokenizer, and examples for them."""

import json
import random
import shutil
from pathlib import Path

import mixtral
from binary import DEMO
from mixtral.train import Mixtral

WORDS = "water king land house people day index table query row".split()


def small_model(folder: Path, experts: int = 4, seed: int = 0, **sizes: object) -> Path:
    """A random model in float32 that knows the 4,096 pieces of the bundled tokenizer; no experts: a dense one."""
    sizes = dict(hidden_size=32, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16) | sizes
    config = mixtral.Config(
        **dict(vocab_size=4096, max_position=128, rms_norm_eps=1e-5, rope_theta=1e4, window=64) | sizes,
        num_experts=experts,
        top_k=2 if experts else 0,
        dtype="float32",
    )
    Mixtral.from_config(config, seed=seed).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, folder / name)
    (folder / "metrics.jsonl").write_text("of another run\n")
    return folder


def write_chats(file: Path, count: int = 24, seed: int = 0) -> Path:
    rng = random.Random(seed)
    with file.open("w") as out:
        for _ in range(count):
            word = rng.choice(WORDS)
            turns = [("user", f"Tell me of the {word}"), ("assistant", f"The {word} is good, the {word} is great.")]
            messages = [{"role": role, "content": content} for role, content in turns * rng.randint(1, 2)]
            out.write(json.dumps({"messages": messages}) + "\n")
    return file


def write_texts(file: Path, count: int = 40, seed: int = 0) -> Path:
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(5, 20))) for _ in range(count)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file
