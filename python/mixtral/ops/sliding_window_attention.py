"""Attention over packed sequences, with or without a sliding window (Beltagy et al., 2020; Jiang et al., 2023)."""

import torch
from torch import Tensor

from ._library import register_fake, register_no_second_backward


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

    The gradients follow from the result and the logarithm ``lse`` of the sum of a query's weights, which the forward
    pass keeps (Dao, "FlashAttention-2", 2023, algorithm 2). With the scores ``s = scale q.k`` of the keys in sight and
    the gradient ``g`` of the result ::

        p = exp(s - lse)        ds = p (g.v - g.out)
        grad_q = scale ds k     grad_k = scale ds^T q     grad_v = p^T g

    Those of k and v are sums over the queries of all heads of a group, in one order, whatever the number of threads and
    the other sequences. A key that a query does not see is left out, even if it is NaN; a query with NaN in ``q`` or
    ``g`` gives NaN to the keys that it sees and to no others.
    """
    arguments = (q, k, v, cu_seqlens_q, cu_seqlens_k, window, causal, scale)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return torch.ops.mixtral.sliding_window_attention_for_backward.default(*arguments)[0]
    return torch.ops.mixtral.sliding_window_attention.default(*arguments)


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


@register_fake("sliding_window_attention_for_backward")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    window: int = 0,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@register_fake("sliding_window_attention_backward")
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    window: int = 0,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.window, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor) -> tuple:
    """Of the op without lse, which is computed a second time."""
    q, k, v, *lengths = ctx.saved_tensors
    options = (*lengths, ctx.window, ctx.causal, ctx.scale)
    out, lse = torch.ops.mixtral.sliding_window_attention_for_backward.default(q, k, v, *options)
    grads = torch.ops.mixtral.sliding_window_attention_backward.default(grad, q, k, v, out, lse, *options)
    return *grads, None, None, None, None, None


def _setup_for_backward(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *lengths, ctx.window, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, *lengths)
    ctx.mark_non_differentiable(output[1])


def _for_backward_backward(ctx, grad: Tensor, _: Tensor | None) -> tuple:
    grads = torch.ops.mixtral.sliding_window_attention_backward.default(
        grad, *ctx.saved_tensors, ctx.window, ctx.causal, ctx.scale
    )
    return *grads, None, None, None, None, None


torch.library.register_autograd("mixtral::sliding_window_attention", _backward, setup_context=_setup)
torch.library.register_autograd(
    "mixtral::sliding_window_attention_for_backward", _for_backward_backward, setup_context=_setup_for_backward
)
register_no_second_backward("sliding_window_attention_backward")
