"""How far the router of one checkpoint is from that of another, on the same text (OLMoE, eq. 5)."""

from typing import TYPE_CHECKING

import numpy as np

from .overlap import overlap
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
    """The ``overlap`` of both checkpoints' experts; ``uniform`` is K / E."""
    others = np.asarray(reference.topk_ids)[tokens.kept, tokens.layers[layer]].astype(np.int64)
    return overlap(tokens, tokens.experts(layer), others) | {"uniform": tokens.top_k / tokens.num_experts}
