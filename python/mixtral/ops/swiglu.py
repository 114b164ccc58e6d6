"""The gated activation between an expert's two matmuls (Shazeer, 2020, eq. 6)."""

import torch
from torch import Tensor

from ._library import register_fake, register_no_backward


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(first half) * second half`` of every row; in f32, rounded once.

    Args:
        gate_up: [M, 2I], float: the gate, then the value.

    Returns:
        [M, I], dtype of ``gate_up``.

    Raises:
        RuntimeError: the shape or dtype does not fit.
    """
    return torch.ops.mixtral.swiglu.default(gate_up)


@register_fake("swiglu")
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


register_no_backward("swiglu")
