"""Rotary position embedding (Su et al., 2021)."""

import torch
from torch import Tensor

from ._library import register_fake, register_no_backward


def rope(q: Tensor, k: Tensor, positions: Tensor, theta: float, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Rotate pair i of every head of token t by ``positions[t] / theta^(2i / D)``.

    Args:
        q: [T, Nq, D], float, D even.
        k: [T, Nkv, D], dtype of ``q``.
        positions: [T], int32 or int64.
        theta: base of the frequencies, > 0.
        interleaved: pairs are (2i, 2i + 1), as in Mistral's consolidated files; else (i, i + D/2), as in Hugging Face.

    Returns:
        (q, k) rotated, shapes and dtype as given. Angles are f32 as in Hugging Face; the rotation is f32, rounded once.

    Raises:
        RuntimeError: a shape, dtype or device does not fit, or D is odd.
    """
    return torch.ops.mixtral.rope.default(q, k, positions, theta, interleaved)


@register_fake("rope")
def _(q: Tensor, k: Tensor, positions: Tensor, theta: float, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


register_no_backward("rope")
