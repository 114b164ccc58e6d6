"""Root-mean-square normalisation (Zhang and Sennrich, 2019, eq. 4), alone and with the residual addition before it."""

import torch
from torch import Tensor

from ._library import register_fake, register_no_second_backward


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension.

    Args:
        x: [T, H], float.
        weight: [H], dtype of ``x``.
        eps: added to the mean square, >= 0.

    Returns:
        [T, H], dtype of ``x``; statistics in f32, the normalised value rounded before it meets the weight.

    Raises:
        RuntimeError: a shape, dtype or device does not fit.

    The gradients, with ``n = x s``, ``s = 1 / sqrt(mean(x^2) + eps)`` and the gradient ``g`` of the result, are ::

        grad_x = s (g weight - n mean(g weight n))    the mean over H
        grad_weight = sum(g n)                        over T

    differentiated from the same equation. The rounding of ``n`` counts as the identity: both use ``n`` in f32, and
    round once, at the end. Rows are added in one order, whatever the number of threads.
    """
    return torch.ops.mixtral.rms_norm.default(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``sum = x + residual`` and ``normed = rms_norm(sum)``.

    Args:
        x, residual: [T, H], float.
        weight: [H], dtype of ``x``.
        eps: added to the mean square, >= 0.

    Returns:
        (normed [T, H], sum [T, H]), dtype of ``x``; the norm is that of the rounded sum.

    Raises:
        RuntimeError: a shape, dtype or device does not fit.

    The gradient of ``x`` and of ``residual`` is that of the norm at ``sum`` plus the gradient of ``sum``, added in f32;
    the gradient of ``weight`` is that of the norm. The rounding of ``sum`` counts as the identity.
    """
    return torch.ops.mixtral.add_rms_norm.default(x, residual, weight, eps)


@register_fake("rms_norm")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@register_fake("rms_norm_backward")
def _(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, want_x: bool = True, want_weight: bool = True
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0] if want_x else 0, x.shape[1]), x.new_empty(x.shape[1] if want_weight else 0)


@register_fake("add_rms_norm")
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@register_fake("add_rms_norm_backward")
def _(
    grad_normed: Tensor,
    grad_sum: Tensor | None,
    sum: Tensor,
    weight: Tensor,
    eps: float,
    want_x: bool = True,
    want_weight: bool = True,
) -> tuple[Tensor, Tensor]:
    return sum.new_empty(sum.shape[0] if want_x else 0, sum.shape[1]), sum.new_empty(sum.shape[1] if want_weight else 0)


def _setup_rms_norm(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_backward(ctx, grad: Tensor) -> tuple:
    want_x, want_weight, _ = ctx.needs_input_grad
    grad_x, grad_weight = torch.ops.mixtral.rms_norm_backward.default(
        grad, *ctx.saved_tensors, ctx.eps, want_x, want_weight
    )
    return grad_x if want_x else None, grad_weight if want_weight else None, None


def _setup_add_rms_norm(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)
    ctx.set_materialize_grads(False)  # a result that is not used has the gradient None


def _add_rms_norm_backward(ctx, grad_normed: Tensor | None, grad_sum: Tensor | None) -> tuple:
    if grad_normed is None:
        return grad_sum, grad_sum, None, None
    want_x, want_residual, want_weight, _ = ctx.needs_input_grad
    grad_x, grad_weight = torch.ops.mixtral.add_rms_norm_backward.default(
        grad_normed, grad_sum, *ctx.saved_tensors, ctx.eps, want_x or want_residual, want_weight
    )
    return (
        grad_x if want_x else None,
        grad_x if want_residual else None,
        grad_weight if want_weight else None,
        None,
    )


torch.library.register_autograd("mixtral::rms_norm", _rms_norm_backward, setup_context=_setup_rms_norm)
torch.library.register_autograd("mixtral::add_rms_norm", _add_rms_norm_backward, setup_context=_setup_add_rms_norm)
register_no_second_backward("rms_norm_backward")
register_no_second_backward("add_rms_norm_backward")
