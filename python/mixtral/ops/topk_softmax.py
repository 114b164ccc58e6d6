"""The router: softmax over the experts and the K best of them (Mixtral of Experts, 2024, eq. 2)."""

import torch
from torch import Tensor

from ._library import register_fake, register_no_second_backward


def topk_softmax(
    router_logits: Tensor, top_k: int, renormalize: bool = True, select_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The ``top_k`` experts of every token and their weights.

    Args:
        router_logits: [T, E], float.
        top_k: K, in [1, E].
        renormalize: divide the K probabilities by their sum, as Mixtral does; ``False`` with ``top_k=1`` is the Switch
            router.
        select_bias: f32 [E], added to the probabilities for the choice, not for the weights (loss-free balancing, Wang
            et al., 2024, eq. 3). It has no gradient.

    Returns:
        (topk_weights f32 [T, K], topk_ids int32 [T, K]), in falling order, with a bias in the order of the biased
        probabilities; of equal ones the smaller id comes first. A row with a NaN or +inf, or of nothing but -inf, has
        NaN weights and still distinct ids in [0, E).

    Raises:
        RuntimeError: a shape, dtype, device or ``top_k`` does not fit.

    The gradient, with the gradient ``g`` of the weights ``w`` and the probabilities ``p``, is ::

        renormalized:  grad[ids_k] = w_k (g_k - sum_j g_j w_j)    0 for the experts not chosen
        otherwise:     grad[e] = p_e (G_e - sum_j g_j w_j)        G_e = g_k for e = ids_k, else 0

    So the weight of ``top_k=1``, renormalized, is 1 and has none: a router of that kind does not learn from the loss.
    """
    return torch.ops.mixtral.topk_softmax.default(router_logits, top_k, renormalize, select_bias)


@register_fake("topk_softmax")
def _(
    router_logits: Tensor, top_k: int, renormalize: bool = True, select_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    shape = (router_logits.shape[0], top_k)
    return router_logits.new_empty(shape, dtype=torch.float32), router_logits.new_empty(shape, dtype=torch.int32)


@register_fake("topk_softmax_backward")
def _(grad: Tensor, router_logits: Tensor, topk_weights: Tensor, topk_ids: Tensor, renormalize: bool = True) -> Tensor:
    return router_logits.new_empty(router_logits.shape)


def _setup(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    router_logits, _, ctx.renormalize, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(router_logits, *output)


def _backward(ctx, grad: Tensor | None, _: object) -> tuple:
    if grad is None or not ctx.needs_input_grad[0]:
        return None, None, None, None
    return torch.ops.mixtral.topk_softmax_backward(grad, *ctx.saved_tensors, ctx.renormalize), None, None, None


torch.library.register_autograd("mixtral::topk_softmax", _backward, setup_context=_setup)
register_no_second_backward("topk_softmax_backward")
