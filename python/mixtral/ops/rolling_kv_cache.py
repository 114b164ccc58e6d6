"""The rolling key/value cache: a pool of pages, written, then attended to (Jiang et al., "Mistral 7B", 2023)."""

import torch
from torch import Tensor

from ._library import register_fake, register_no_backward


def rolling_kv_cache_write(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """Store token t's key and value in page ``slot_mapping[t] // P``, row ``slot_mapping[t] % P``. In place.

    Args:
        k_cache, v_cache: [pages, P, Nkv, D], float, contiguous.
        k, v: [T, Nkv, D], dtype of the caches.
        slot_mapping: [T], int32 or int64.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; on the CPU also for a slot outside the pool or named twice,
            before anything is written. On CUDA a slot outside the pool is dropped.
    """
    torch.ops.mixtral.rolling_kv_cache_write.default(k_cache, v_cache, k, v, slot_mapping)


def rolling_kv_cache_rope_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    theta: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """``rope`` and ``rolling_kv_cache_write`` in one pass, bit for bit: the rotated keys go straight to the cache.

    Args:
        q: [T, Nq, D], float, D even. Like ``k`` and ``v`` it may be a slice of one projection [T, (Nq + 2 Nkv) * D]:
            tokens may lie apart without a copy.
        k, v: [T, Nkv, D], dtype of ``q``.
        positions: [T], int32 or int64.
        theta: base of the frequencies, > 0.
        k_cache, v_cache: [pages, P, Nkv, D], dtype of ``q``, contiguous. In place.
        slot_mapping: [T], int32 or int64: page * P + row.

    Returns:
        ``q`` rotated (half-split, as in Hugging Face), [T, Nq, D].

    Raises:
        RuntimeError: as the two ops do, before anything is written.
    """
    return torch.ops.mixtral.rolling_kv_cache_rope_write.default(
        q, k, v, positions, theta, k_cache, v_cache, slot_mapping
    )


def rolling_kv_cache_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    window: int = 0,
    scale: float | None = None,
) -> Tensor:
    """Causal attention of B sequences' newest queries to their cached keys: prefill chunks and decode steps alike.

    Position p of sequence b lies in page ``page_table[b, (p // P) % R]``, row ``p % P``; query i of n sits at position
    ``kv_lens[b] - n + i`` and sees the last ``window`` keys up to its own.

    Args:
        q: [T, Nq, D], float.
        k_cache, v_cache: [pages, P, Nkv, D], dtype of ``q``, contiguous; Nq is a multiple of Nkv.
        page_table: [B, R], int32 or int64; entries that no query needs may hold anything.
        cu_seqlens_q: [B + 1], int32 or int64: where each sequence's queries start, and the total.
        kv_lens: [B], int32 or int64: keys of each sequence, those of this call included.
        window: 0 for none.
        scale: of the scores, 1 / sqrt(D) by default.

    Returns:
        [T, Nq, D], dtype of ``q``, on CPU bit for bit what ``sliding_window_attention`` gives on the same keys. Rows
        of the cache that no query sees are never read.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; on the CPU also if a key that is seen has no page.
    """
    return torch.ops.mixtral.rolling_kv_cache_attention.default(
        q, k_cache, v_cache, page_table, cu_seqlens_q, kv_lens, window, scale
    )


@register_fake("rolling_kv_cache_write")
def _(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    return None


@register_fake("rolling_kv_cache_rope_write")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    theta: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    return q.new_empty(q.shape)


@register_fake("rolling_kv_cache_attention")
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    window: int = 0,
    scale: float | None = None,
) -> Tensor:
    return q.new_empty(q.shape)


register_no_backward("rolling_kv_cache_attention")
