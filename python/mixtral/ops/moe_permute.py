"""Capacity-free token permutation: rows sorted by expert for the grouped matmuls, and the weighted way back."""

import torch
from torch import Tensor

from ._library import register_fake, register_no_second_backward


def moe_permute(x: Tensor, topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """One copy of every row of ``x`` per chosen expert, sorted by expert, then by token (stable).

    Args:
        x: [T, H], float.
        topk_ids: [T, K], int32 or int64, in [0, E), or -1 for none.
        num_experts: E, >= 1.

    Returns:
        (permuted [M, H], offs int32 [E], row_map int32 [T, K]) with M = T*K: rows ``offs[e-1]`` to ``offs[e]`` belong
        to expert e, and ``permuted[row_map[t, k]] == x[t]``. A copy of expert -1 is dropped: its ``row_map`` is -1,
        ``offs`` does not count it, and the rows left over, at the end, are zero. No capacity limits the experts.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; on the CPU, an id is outside [-1, E). On CUDA a copy with a
            bad id is dropped.

    The gradient is ``grad_x[t] = sum_k grad[row_map[t, k]]``: in f32, k in order, rounded once.
    """
    return torch.ops.mixtral.moe_permute.default(x, topk_ids, num_experts)


def moe_unpermute(y: Tensor, topk_weights: Tensor, row_map: Tensor) -> Tensor:
    """``sum_k topk_weights[t, k] * y[row_map[t, k]]``: in f32, k in order, rounded once.

    Args:
        y: [M, H], float.
        topk_weights: f32 [T, K].
        row_map: [T, K], int32 or int64, as from :func:`moe_permute`; a copy at -1 counts as zero.

    Returns:
        [T, H], dtype of ``y``.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; on the CPU, a row is outside [-1, M), or in backward, a row
            is there twice.

    The gradients, with the gradient ``g`` [T, H] of the result, are ::

        grad_y[row_map[t, k]] = topk_weights[t, k] g[t]              0 in a row that no copy has
        grad_topk_weights[t, k] = sum_h g[t, h] y[row_map[t, k], h]  0 for a copy at -1
    """
    return torch.ops.mixtral.moe_unpermute.default(y, topk_weights, row_map)


@register_fake("moe_permute")
def _(x: Tensor, topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens, top_k = topk_ids.shape
    return (
        x.new_empty((tokens * top_k, x.shape[1])),
        x.new_empty((num_experts,), dtype=torch.int32),
        x.new_empty((tokens, top_k), dtype=torch.int32),
    )


@register_fake("moe_unpermute")
def _(y: Tensor, topk_weights: Tensor, row_map: Tensor) -> Tensor:
    return y.new_empty((row_map.shape[0], y.shape[1]))


@register_fake("moe_permute_backward")
def _(grad: Tensor, row_map: Tensor) -> Tensor:
    return grad.new_empty((row_map.shape[0], grad.shape[1]))


@register_fake("moe_unpermute_backward")
def _(
    grad: Tensor,
    y: Tensor,
    topk_weights: Tensor,
    row_map: Tensor,
    want_y: bool = True,
    want_topk_weights: bool = True,
) -> tuple[Tensor, Tensor]:
    tokens, top_k = row_map.shape
    return (
        y.new_empty((y.shape[0] if want_y else 0, y.shape[1])),
        topk_weights.new_empty((tokens if want_topk_weights else 0, top_k)),
    )


def _setup_permute(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[2])


def _permute_backward(ctx, grad: Tensor | None, *_: object) -> tuple:
    if grad is None or not ctx.needs_input_grad[0]:
        return None, None, None
    return torch.ops.mixtral.moe_permute_backward(grad, *ctx.saved_tensors), None, None


def _setup_unpermute(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _unpermute_backward(ctx, grad: Tensor) -> tuple:
    wanted = ctx.needs_input_grad[:2]
    gradients = torch.ops.mixtral.moe_unpermute_backward(grad, *ctx.saved_tensors, *wanted)
    return *(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)), None


torch.library.register_autograd("mixtral::moe_permute", _permute_backward, setup_context=_setup_permute)
torch.library.register_autograd("mixtral::moe_unpermute", _unpermute_backward, setup_context=_setup_unpermute)
register_no_second_backward("moe_permute_backward")
register_no_second_backward("moe_unpermute_backward")
