"""A whole sparse feed-forward layer behind its router: permute, expert matmuls, weighted sum."""

from typing import Any

import torch
from torch import Tensor

from ._library import register_fake, register_no_second_backward
from .pack_weight import weight_columns, weight_depth

RECOMPUTE = ("none", "act", "all")


def moe_mlp(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    recompute: str = "act",
) -> Tensor:
    """``out[t] = sum_k topk_weights[t, k] * down_proj[e] @ swiglu(gate_up_proj[e] @ x[t])``, ``e = topk_ids[t, k]``.

    On the CPU equal bit for bit to ``moe_permute``, ``grouped_gemm``, ``swiglu``, ``grouped_gemm``, ``moe_unpermute``.

    Args:
        x: [T, H], float.
        topk_weights: f32 [T, K].
        topk_ids: [T, K], int32 or int64, in [0, E), or -1 for none: such a copy is dropped, whatever its weight.
        gate_up_proj: [E, 2I, H], dtype of ``x``; rows of the gate, then of the value (Hugging Face's layout).
        down_proj: [E, H, I], dtype of ``x``. Each of the two is plain or packed (:func:`pack_weight`), with
            I a multiple of 32 when ``gate_up_proj`` is packed; a quantised one goes with bf16 ``x`` alone.
        recompute: what the backward pass computes again instead of keeping it, where a gradient is wanted:
            "none", "act": the activation, or "all": the first product too. The bits of all results are the same.

    Returns:
        [T, H], dtype of ``x``.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; on the CPU, an id is outside [-1, E) (on CUDA its copy is
            dropped).
        ValueError: ``recompute`` is none of the three.

    Kept for the backward pass, besides the weights of the experts, are ``x``, ``topk_weights``, ``topk_ids`` and

    ===========  ===================================  ================================
    recompute    besides                              values of the dtype of x a token
    ===========  ===================================  ================================
    "none"       gate_up [M, 2I], activated [M, I]    H + 3 K I
    "act"        gate_up [M, 2I]                      H + 2 K I
    "all"                                             H
    ===========  ===================================  ================================

    but never a copy of the rows of ``x`` or of the outputs of the experts. With ``z = gate_up_proj[e] @ x[t]``,
    ``a = swiglu(z)``, the weight ``w`` of a copy and the gradient ``grad[t]``, the gradients are (Guo et al.,
    "SonicMoE", 2025) ::

        g = down_proj[e].T @ grad[t]
        grad_topk_weights[t, k] = g . a
        grad_z = swiglu_backward(w g, z)
        grad_x[t] = sum_k gate_up_proj[e].T @ grad_z
        grad_gate_up_proj[e] = sum of outer(grad_z, x[t])       over the copies of e; exact zeros without one
        grad_down_proj[e] = sum of outer(grad[t], w a)

    where g, grad_z, w a and the terms of grad_x are rounded to the dtype of ``x``. Only wanted ones are computed. A
    packed weight has no gradient; those of the other inputs are those with the unpacked one, and roundings of rows to
    e4m3 count as the identity.
    """
    if recompute not in RECOMPUTE:
        raise ValueError(f"moe_mlp: recompute must be one of {', '.join(RECOMPUTE)}, got {recompute}")
    arguments = (x, topk_weights, topk_ids, gate_up_proj, down_proj)
    wanted = torch.is_grad_enabled() and any(argument.requires_grad for argument in arguments)
    if recompute == "all" or not wanted:
        return torch.ops.mixtral.moe_mlp.default(*arguments)
    return torch.ops.mixtral.moe_mlp_for_backward.default(*arguments, recompute == "none")[0]


@register_fake("moe_mlp")
def _(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@register_fake("moe_mlp_for_backward")
def _(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    keep_activated: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    copies, intermediate = topk_ids.shape[0] * topk_ids.shape[1], weight_depth(down_proj)
    activated = x.new_empty((copies if keep_activated else 0, intermediate))
    return x.new_empty(x.shape), x.new_empty((copies, 2 * intermediate)), activated


@register_fake("moe_mlp_backward")
def _(
    grad: Tensor,
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up: Tensor | None = None,
    activated: Tensor | None = None,
    want_x: bool = True,
    want_topk_weights: bool = True,
    want_gate_up_proj: bool = True,
    want_down_proj: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (tokens, hidden), experts = x.shape, gate_up_proj.shape[0]
    return (
        x.new_empty((tokens if want_x else 0, hidden)),
        topk_weights.new_empty((tokens if want_topk_weights else 0, topk_weights.shape[1])),
        x.new_empty((experts if want_gate_up_proj else 0, weight_columns(gate_up_proj), hidden)),
        x.new_empty((experts if want_down_proj else 0, hidden, weight_depth(down_proj))),
    )


def _save_inputs(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs, None, None)


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *arguments, keep_activated = inputs
    _, gate_up, activated = output
    ctx.mark_non_differentiable(gate_up, activated)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*arguments, gate_up, activated if keep_activated else None)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    x, topk_weights, topk_ids, gate_up_proj, down_proj, gate_up, activated = ctx.saved_tensors
    want = [ctx.needs_input_grad[i] for i in (0, 1, 3, 4)]
    for name, weight, wanted in (("gate_up_proj", gate_up_proj, want[2]), ("down_proj", down_proj, want[3])):
        if wanted and weight.dim() == 4:
            raise RuntimeError(f"moe_mlp: {name} is packed and has no gradient; give the plain weight, or freeze it")
    grads = torch.ops.mixtral.moe_mlp_backward.default(
        grad, x, topk_weights, topk_ids, gate_up_proj, down_proj, gate_up, activated, *want
    )
    wanted_x, wanted_weights, *wanted_projections = (
        grad if wanted else None for grad, wanted in zip(grads, want, strict=True)
    )
    rest = (None,) * (len(ctx.needs_input_grad) - 5)
    return wanted_x, wanted_weights, None, *wanted_projections, *rest


torch.library.register_autograd("mixtral::moe_mlp", _backward, setup_context=_save_inputs)
torch.library.register_autograd("mixtral::moe_mlp_for_backward", _backward, setup_context=_save_for_backward)
register_no_second_backward("moe_mlp_backward")
