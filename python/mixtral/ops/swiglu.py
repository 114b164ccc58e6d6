"""The gated activation between an expert's two matmuls (Shazeer, 2020, eq. 6)."""

import torch
from torch import Tensor

from ._library import register_fake, register_no_second_backward


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(first half) * second half`` of every row; in f32, rounded once.

    Args:
        gate_up: [M, 2I], float: the gate, then the value.

    Returns:
        [M, I], dtype of ``gate_up``.

    Raises:
        RuntimeError: the shape or dtype does not fit.

    The gradients, with ``s = 1 / (1 + exp(-gate))`` and the gradient ``g`` of the result, are ::

        grad_gate = g up s (1 + gate (1 - s))
        grad_up = g gate s

    differentiated from the same equation; in f32, rounded once.
    """
    return torch.ops.mixtral.swiglu.default(gate_up)


@register_fake("swiglu")
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


@register_fake("swiglu_backward")
def _(grad: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _setup(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> Tensor:
    return torch.ops.mixtral.swiglu_backward.default(grad, *ctx.saved_tensors)


torch.library.register_autograd("mixtral::swiglu", _backward, setup_context=_setup)
register_no_second_backward("swiglu_backward")
