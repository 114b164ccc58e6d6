"""Training: tokens/s of forward, backward and AdamW beside transformers with ``grouped_mm`` experts and SDPA attention.

Both train the same random weights on the same tokens, in turns. A step is 1024 tokens of two packed rows; transformers
gets them as two rows. Neither has a balance loss.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from common import Bench, Row, main
from mixtral.train import Batch, Mixtral, RouterOptions
from random_models import SHAPES, model_config

ROWS, LENGTH = 2, 512
TURNS = 5
CASES = [("mini", torch.bfloat16), ("mini", torch.float32)]


def step_of(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], float]:
    """A training step; it returns its seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def run_case(bench: Bench, name: str, dtype: torch.dtype) -> None:
    model = Mixtral.from_config(
        model_config(SHAPES[name]), dtype, router=RouterOptions(balance="none", z_coefficient=0.0)
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "model")
        twin = AutoModelForCausalLM.from_pretrained(
            Path(folder) / "model", dtype=dtype, attn_implementation="sdpa", experts_implementation="grouped_mm"
        ).train()
    input_ids = torch.randint(model.config.vocab_size, (ROWS, LENGTH))
    batch = Batch.from_padded(input_ids)
    steps = {
        "ours": step_of(model, lambda: model.loss(batch).total),
        "transformers grouped_mm": step_of(twin, lambda: twin(input_ids, labels=input_ids, use_cache=False).loss),
    }
    for step in steps.values():
        step()  # warms up
    seconds: dict[str, list[float]] = {who: [] for who in steps}
    for _ in range(TURNS):
        for who, step in steps.items():
            seconds[who].append(step())
    (_, mine), (peer, theirs) = ((who, ROWS * LENGTH / statistics.median(s)) for who, s in seconds.items())
    case = f"{name} {str(dtype).removeprefix('torch.')}, {ROWS} x {LENGTH} tokens"
    bench.rows.append(Row(case, "training", mine, "tokens/s", peer=peer, peer_value=theirs, ratio=mine / theirs))
    print(f"{case:40s} {mine:8.1f} tokens/s  x {mine / theirs:5.2f} of {peer} {theirs:8.1f}", flush=True)


def run(bench: Bench) -> None:
    import transformers

    bench.versions["transformers"] = transformers.__version__
    with torch.enable_grad():
        for name, dtype in CASES:
            run_case(bench, name, dtype)


if __name__ == "__main__":
    main("train", run, devices=("cpu",))
