"""Rotary position embedding (Su et al., 2021)."""

import torch
from torch import Tensor

from ._library import register_fake, register_no_second_backward


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

    A rotation is orthogonal: the gradients of ``q`` and ``k`` are those of the results, rotated by ``-positions``.
    """
    return torch.ops.mixtral.rope.default(q, k, positions, theta, interleaved)


@register_fake("rope")
def _(q: Tensor, k: Tensor, positions: Tensor, theta: float, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@register_fake("rope_backward")
def _(
    grad_q: Tensor, grad_k: Tensor, positions: Tensor, theta: float, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    return grad_q.new_empty(grad_q.shape), grad_k.new_empty(grad_k.shape)


def _setup(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, _, positions, ctx.theta, ctx.interleaved = inputs
    ctx.save_for_backward(positions)
    ctx.set_materialize_grads(False)  # a result that is not used has the gradient None


def _backward(ctx, *grads: Tensor | None) -> tuple:
    wanted = [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)]
    given = [grad for grad in wanted if grad is not None]
    if not given:
        return (None,) * 5
    no_heads = given[0][:, :0]
    rotated = torch.ops.mixtral.rope_backward.default(
        *(no_heads if grad is None else grad for grad in wanted), *ctx.saved_tensors, ctx.theta, ctx.interleaved
    )
    return *(None if grad is None else back for grad, back in zip(wanted, rotated, strict=True)), None, None, None


torch.library.register_autograd("mixtral::rope", _backward, setup_context=_setup)
register_no_second_backward("rope_backward")
