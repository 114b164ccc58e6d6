"""Root-mean-square normalisation (Zhang and Sennrich, 2019, eq. 4), alone and with the residual addition before it."""

import torch
from torch import Tensor

from ._library import register_fake, register_no_backward


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
    """
    return torch.ops.mixtral.add_rms_norm.default(x, residual, weight, eps)


@register_fake("rms_norm")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@register_fake("add_rms_norm")
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


register_no_backward("rms_norm")
register_no_backward("add_rms_norm")
