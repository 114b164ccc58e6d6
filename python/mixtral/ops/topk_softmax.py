"""The router: softmax over the experts and the K best of them (Mixtral of Experts, 2024, eq. 2)."""

import torch
from torch import Tensor

from ._library import register_fake, register_no_backward


def topk_softmax(router_logits: Tensor, top_k: int, renormalize: bool = True) -> tuple[Tensor, Tensor]:
    """The ``top_k`` experts of every token and their weights.

    Args:
        router_logits: [T, E], float.
        top_k: K, in [1, E].
        renormalize: divide the K probabilities by their sum, as Mixtral does; ``False`` with ``top_k=1`` is the Switch
            router.

    Returns:
        (topk_weights f32 [T, K], topk_ids int32 [T, K]), in falling order; of equal logits the smaller id comes first.
        A row with a NaN or +inf, or of nothing but -inf, has NaN weights and still distinct ids in [0, E).

    Raises:
        RuntimeError: a shape, dtype or ``top_k`` does not fit.
    """
    return torch.ops.mixtral.topk_softmax.default(router_logits, top_k, renormalize)


@register_fake("topk_softmax")
def _(router_logits: Tensor, top_k: int, renormalize: bool = True) -> tuple[Tensor, Tensor]:
    shape = (router_logits.shape[0], top_k)
    return router_logits.new_empty(shape, dtype=torch.float32), router_logits.new_empty(shape, dtype=torch.int32)


register_no_backward("topk_softmax")
