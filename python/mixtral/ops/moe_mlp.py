"""A whole sparse feed-forward layer behind its router: permute, expert matmuls, weighted sum."""

import torch
from torch import Tensor

from ._library import register_fake, register_no_backward


def moe_mlp(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """``out[t] = sum_k topk_weights[t, k] * down_proj[e] @ swiglu(gate_up_proj[e] @ x[t])``, ``e = topk_ids[t, k]``.

    On the CPU equal bit for bit to ``moe_permute``, ``grouped_gemm``, ``swiglu``, ``grouped_gemm``, ``moe_unpermute``.

    Args:
        x: [T, H], float.
        topk_weights: f32 [T, K].
        topk_ids: [T, K], int32 or int64, in [0, E).
        gate_up_proj: [E, 2I, H], dtype of ``x``; rows of the gate, then of the value (Hugging Face's layout).
        down_proj: [E, H, I], dtype of ``x``. Each of the two is plain or packed (:func:`pack_weight`), with
            I a multiple of 32 when ``gate_up_proj`` is packed; a quantised one goes with bf16 ``x`` alone.

    Returns:
        [T, H], dtype of ``x``.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; on the CPU, an id is outside [0, E) (on CUDA its copy is
            dropped).
    """
    return torch.ops.mixtral.moe_mlp.default(x, topk_weights, topk_ids, gate_up_proj, down_proj)


@register_fake("moe_mlp")
def _(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    return x.new_empty(x.shape)


register_no_backward("moe_mlp")
