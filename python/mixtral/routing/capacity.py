"""What a capacity limit, which Mixtral does not have, would drop; and how even the work of several devices is."""

import numpy as np

from .tokens import Tokens

FACTORS = (1.0, 1.25, 2.0)
RANKS = (2, 4, 8)
BATCH = 512  # tokens
TENTHS = 10


def capacity(tokens: Tokens, layer: int) -> dict | None:
    """{factor: dropped assignments}; batches are 512 consecutive tokens, a last incomplete one is left out.

    An expert takes ceil(factor · batch · K / E) tokens of a batch, earlier ones first (Switch Transformer, 2.2).
    ``dropped`` is the share of assignments, ``by_position`` that of each tenth of the batch: what OpenMoE calls
    drop-towards-the-end. None for fewer tokens than one batch.
    """
    batches = len(tokens) // BATCH
    if batches == 0:
        return None
    chosen = tokens.members(tokens.experts(layer)[: batches * BATCH]).reshape(batches, BATCH, -1)
    rank = np.cumsum(chosen, axis=1, dtype=np.int16)
    assignments = BATCH * tokens.top_k
    result = {}
    for factor in FACTORS:
        limit = int(np.ceil(factor * assignments / tokens.num_experts))
        dropped = (chosen & (rank > limit)).sum((0, 2)) / (batches * tokens.top_k)  # at each place of the batch
        tenths = np.array_split(dropped, TENTHS)
        result[str(factor)] = {
            "dropped": float(dropped.mean()),
            "by_position": [float(tenth.mean()) for tenth in tenths],
        }
    return result


def expert_parallel(tokens: Tokens, layer: int, seed: int = 0) -> dict | None:
    """{ranks: largest over mean load of a rank, mean over batches of 512 tokens}, experts in equal runs on the ranks.

    ``null`` has the same tokens in random order: what is above it comes from neighbours that are alike. Only numbers of
    ranks that divide E. None for fewer tokens than one batch.
    """
    batches = len(tokens) // BATCH
    if batches == 0:
        return None
    experts = tokens.experts(layer)
    mixed = experts[np.random.default_rng(seed).permutation(len(tokens))]
    result = {}
    for ranks in RANKS:
        if tokens.num_experts % ranks == 0:
            value, null = (_imbalance(e, ranks, batches, tokens.num_experts) for e in (experts, mixed))
            result[str(ranks)] = {"max_over_mean": value, "null": null}
    return result


def _imbalance(experts: np.ndarray, ranks: int, batches: int, num_experts: int) -> float:
    rank = experts[: batches * BATCH] * ranks // num_experts
    batch = np.repeat(np.arange(batches), BATCH)[:, None]
    load = np.bincount((batch * ranks + rank).ravel(), minlength=batches * ranks).reshape(batches, ranks)
    return float((load.max(1) / load.mean(1)).mean())
