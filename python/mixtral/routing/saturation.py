"""How far the router of one checkpoint is from that of another, on the same text (OLMoE, eq. 5)."""

from typing import TYPE_CHECKING

import numpy as np

from .statistics import interval
from .tokens import Tokens

if TYPE_CHECKING:
    from ..trace import Trace


def check_same_text(trace: "Trace", reference: "Trace") -> None:
    """
    Raises:
        ValueError: the traces are not of the same tokens, or not of models of the same shape.
    """
    shapes = [f"{t.topk_ids.shape[1]} layers, {t.topk_ids.shape[2]} of {t.num_experts}" for t in (trace, reference)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"--reference: a trace of another model: expected {shapes[0]} experts, got {shapes[1]}")
    if not np.array_equal(trace.token_ids, reference.token_ids):
        raise ValueError("--reference: a trace of another text: its tokens are not those of this run")


def saturation(tokens: Tokens, reference: "Trace", layer: int) -> dict:
    """Mean |S ∩ S'| / K over tokens, with its interval.

    ``null`` is what independent choices with both loads have, Σ m m' / K; ``uniform`` is K / E.
    """
    others = np.asarray(reference.topk_ids)[tokens.kept, tokens.layers[layer]].astype(np.int64)
    mine, theirs = tokens.members(tokens.experts(layer)), tokens.members(others)
    shared = (mine & theirs).sum(1) / tokens.top_k
    half = tokens.units.half_width(tokens.units.sums(shared), tokens.units.sums(np.ones(len(shared))))
    null = float(mine.mean(0) @ theirs.mean(0)) / tokens.top_k
    return interval(shared.mean(), float(half), 0, 1) | {"null": null, "uniform": tokens.top_k / tokens.num_experts}
