"""The sums that the losses of a router are made of (Switch Transformers, 2021, eq. 4; ST-MoE, 2022, eq. 5)."""

import torch
from torch import Tensor

from ._library import register_fake, register_no_second_backward


def router_losses(
    router_logits: Tensor, topk_ids: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over tokens, which add over microbatches, layers and ranks; ``mixtral.train`` makes losses of them.

    Args:
        router_logits: [T, E], float.
        topk_ids: [T, K], int32 or int64, the choices to count, in [0, E).
        mask: bool [T], true for a token that counts; others are skipped, whatever they hold.

    Returns:
        (load int64 [E], prob_sum f32 [E], z_sum f32 [], count int64 []): the choices of each expert, its softmax
        probabilities, (log sum_e exp)^2, and the tokens. On the CPU tokens are added in order, in f64: the bits do not
        depend on masked tokens in between, nor on the number of threads.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; on the CPU, an id of a token that counts is outside [0, E).
            On CUDA such an id is not counted.

    The gradient, with the gradients ``a`` [E] of prob_sum and ``b`` of z_sum and the softmax ``p``, is ::

        grad[t, e] = p_te (a_e - sum_j a_j p_tj + 2 b lse_t)    lse_t = log sum_e exp router_logits[t, e]

    and 0 for a masked token. With the balance loss E sum_e f_e prob_sum_e / n, so a_e = E f_e / n, that is
    (E / n) p_te (f_e - sum_j f_j p_tj), and (2 / n) lse_t p_te with the z-loss z_sum / n.
    """
    return torch.ops.mixtral.router_losses.default(router_logits, topk_ids, mask)


@register_fake("router_losses")
def _(router_logits: Tensor, topk_ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    experts = router_logits.shape[1]
    return (
        router_logits.new_empty((experts,), dtype=torch.int64),
        router_logits.new_empty((experts,), dtype=torch.float32),
        router_logits.new_empty((), dtype=torch.float32),
        router_logits.new_empty((), dtype=torch.int64),
    )


@register_fake("router_losses_backward")
def _(grad_prob_sum: Tensor, grad_z_sum: Tensor, router_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    return router_logits.new_empty(router_logits.shape)


def _setup(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    router_logits, _, mask = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[0], output[3])
    ctx.save_for_backward(router_logits, mask)


def _backward(ctx, _load: object, grad_prob_sum: Tensor | None, grad_z_sum: Tensor | None, _count: object) -> tuple:
    router_logits, mask = ctx.saved_tensors
    if grad_prob_sum is None:
        grad_prob_sum = router_logits.new_zeros(router_logits.shape[1], dtype=torch.float32)
    if grad_z_sum is None:
        grad_z_sum = router_logits.new_zeros((), dtype=torch.float32)
    return torch.ops.mixtral.router_losses_backward(grad_prob_sum, grad_z_sum, router_logits, mask), None, None


torch.library.register_autograd("mixtral::router_losses", _backward, setup_context=_setup)
register_no_second_backward("router_losses_backward")
