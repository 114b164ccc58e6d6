"""Attention over packed sequences, with or without a sliding window (Beltagy et al., 2020; Jiang et al., 2023)."""

import torch
from torch import Tensor

from ._library import register_fake, register_no_backward


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    window: int = 0,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention within each of B packed sequences.

    Queries are aligned to the end of their sequence: with Lq queries and Lk keys, query i sits at position i + Lk - Lq.
    It sees key j if and only if 0 <= position - j < window: ``window`` keys, its own included.

    Args:
        q: [Tq, Nq, D], float.
        k, v: [Tk, Nkv, D], dtype of ``q``; Nq is a multiple of Nkv.
        cu_seqlens_q, cu_seqlens_k: [B + 1], int32 or int64: where each sequence starts, and the total.
        window: 0 for none.
        causal: False for plain block-diagonal attention, without a window.
        scale: of the scores, 1 / sqrt(D) by default.

    Returns:
        [Tq, Nq, D], dtype of ``q``; softmax in f32. A query that sees no key gives zeros. On the CPU the bits of a row
        depend on the query and its keys alone.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; on the CPU also if cu_seqlens do not rise from 0 to T.
    """
    return torch.ops.mixtral.sliding_window_attention.default(
        q, k, v, cu_seqlens_q, cu_seqlens_k, window, causal, scale
    )


@register_fake("sliding_window_attention")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    window: int = 0,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    return q.new_empty(q.shape)


register_no_backward("sliding_window_attention")
