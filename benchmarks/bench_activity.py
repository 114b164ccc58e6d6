"""What activity costs: a sparse model beside its dense twins of equal active and of equal total parameters.

The twins differ in the feed-forward block alone: E experts of I with K active, one dense block of K·I, and one of E·I.
Weights are random, so this is speed; the quality that the parameters buy is not in it. ``scripts/activity_figure.py``
draws the record.
"""

import dataclasses
import statistics
import time

import mixtral
from common import Bench, Row, main
from random_models import MIXTRAL_8X7B, Shape, model_config

SHAPE = Shape(hidden=1024, layers=8, heads=16, kv_heads=4, head_dim=64, intermediate=1792, vocab=4096)
SPARSE, ACTIVE, TOTAL = "8 experts, 2 active", "dense, equal active", "dense, equal total"
PROMPT = [5 + 7 * i % 4000 for i in range(256)]
NEW_TOKENS = 9
SECONDS = 30.0
BATCHES = (1, 8)


def twins(shape: Shape) -> dict[str, mixtral.Config]:
    """The model of this shape and the two dense ones beside it."""

    def dense(factor: int) -> mixtral.Config:
        return model_config(dataclasses.replace(shape, intermediate=factor * shape.intermediate, experts=0, top_k=0))

    return {SPARSE: model_config(shape), ACTIVE: dense(shape.top_k), TOTAL: dense(shape.experts)}


def work_per_token(sizes: mixtral.Config) -> tuple[float, float]:
    """GFLOP and GB of bf16 weights for one token alone: of all active weights but the embedding, where it reads a row.

    Attention over the tokens before it is left out: it is the same in the twins.
    """
    weights = sizes.active_parameters - sizes.vocab_size * sizes.hidden_size
    return 2 * weights / 1e9, 2 * weights / 1e9


def rates(model: mixtral.Mixtral) -> dict[str, float]:
    """tokens/s of one round."""
    start = time.perf_counter()
    model.generate([PROMPT], max_tokens=1)
    found = {"prefill": len(PROMPT) / (time.perf_counter() - start)}
    for batch in BATCHES:
        prompts = [PROMPT[17 * i :][:8] for i in range(batch)]
        model.generate(prompts, max_tokens=NEW_TOKENS, ignore_eos=True)
        found[f"decode, batch {batch}"] = batch * (NEW_TOKENS - 1) / model.timings.decode_seconds
    return found


def run(bench: Bench) -> None:
    for case, shape in (("Mixtral 8x7B", MIXTRAL_8X7B), ("measured", SHAPE)):
        for name, sizes in twins(shape).items():
            gflop, gigabytes = work_per_token(sizes)
            for metric, value, unit in (
                ("parameters, total", sizes.total_parameters / 1e9, "10^9"),
                ("parameters, active", sizes.active_parameters / 1e9, "10^9"),
                ("arithmetic per token", gflop, "GFLOP"),
                ("weights read per token alone", gigabytes, "GB in bf16"),
            ):
                bench.rows.append(Row(f"{case}: {name}", metric, value, unit))
                print(f"{case + ': ' + name:40s} {metric:30s} {value:10.3f} {unit}")
    models = {name: mixtral.Mixtral.from_config(sizes, prefix_cache=False) for name, sizes in twins(SHAPE).items()}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for model in models.values():
        rates(model)  # warms up
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(rounds[SPARSE]) < 3:
        for name, model in models.items():
            rounds[name].append(rates(model))
    for metric in rounds[SPARSE][0]:
        median = {name: statistics.median(found[metric] for found in rounds[name]) for name in models}
        for name in models:
            ratio = median[name] / median[ACTIVE]
            bench.rows.append(
                Row(f"measured: {name}", metric, median[name], "tokens/s", None, None, ACTIVE, median[ACTIVE], ratio)
            )
            print(f"{name:24s} {metric:18s} {median[name]:10.1f} tokens/s  x {ratio:.2f} of {ACTIVE}")


if __name__ == "__main__":
    main("activity", run, devices=("cpu",))
