"""The whole router: logits in the router's dtype, softmax, the K best experts (Mixtral of Experts, 2024, eq. 2)."""

import torch
from torch import Tensor

from ._library import register_fake, register_no_backward


def moe_route(x: Tensor, router: Tensor, top_k: int, renormalize: bool = True) -> tuple[Tensor, Tensor]:
    """``topk_softmax(x.to(router.dtype) @ router.T)``; on the CPU equal to it bit for bit, on CUDA one kernel.

    Args:
        x: [T, H], float.
        router: [E, H], f32 (Switch's selective precision) or the dtype of ``x`` (logits are rounded to it then).
        top_k: K, in [1, E].
        renormalize: as in :func:`topk_softmax`.

    Returns:
        (topk_weights f32 [T, K], topk_ids int32 [T, K]), as :func:`topk_softmax` gives them.

    Raises:
        RuntimeError: a shape, dtype, device or ``top_k`` does not fit; on CUDA, more than 2048 experts.
    """
    return torch.ops.mixtral.moe_route.default(x, router, top_k, renormalize)


@register_fake("moe_route")
def _(x: Tensor, router: Tensor, top_k: int, renormalize: bool = True) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], top_k)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int32)


register_no_backward("moe_route")
