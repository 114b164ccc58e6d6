"""What training minimizes: how the losses of vocabulary and routers add up over the microbatches of a step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .batch import Batch, Losses, StepTotals
from .losses import RouterSums, load_balance_loss_from_sums, router_sums, z_loss_from_sums
from .options import RouterOptions


def share_of_step(
    cross_entropies: Tensor,
    routings: Sequence[tuple[Tensor, Tensor]],
    batch: Batch,
    step: StepTotals | None,
    top_k: int,
    options: RouterOptions,
) -> Losses:
    """The share of a microbatch in the losses of its step.

    Args:
        cross_entropies: f32 [], summed over the targets.
        routings: of each sparse layer the router's logits f32 [T, E] and the experts chosen int32 [T, K].
        batch: the microbatch.
        step: the totals of the step; None: the microbatch is all of it.
        top_k: K.
        options: which losses of the routers count, and how much.
    """
    targets = batch.targets
    step = StepTotals(targets, batch.tokens) if step is None else step
    any_targets = torch.as_tensor(step.targets, device=targets.device).clamp(min=torch.finfo(torch.float32).tiny)
    cross_entropy = cross_entropies / any_targets
    if not routings:
        none = cross_entropy.new_zeros(())
        empty = none.new_zeros(0)
        return Losses(cross_entropy, cross_entropy.detach(), none, none, targets, batch.tokens, empty[None], empty)
    logits, ids = zip(*routings, strict=True)
    sums = router_sums(logits, top_k, topk_ids=ids)
    balance = _balance(sums, top_k, options.balance, step)
    z = z_loss_from_sums(sums.z_sum, torch.full_like(sums.count, step.tokens))
    coefficient = options.balance_coefficient if options.balance in ("switch", "global") else 0.0
    total = cross_entropy + coefficient * balance + options.z_coefficient * z
    with torch.no_grad():
        max_logit = torch.stack([x.abs().amax() for x in logits])
    parts = (x.detach() for x in (cross_entropy, balance, z))
    return Losses(total, *parts, targets, batch.tokens, sums.load, max_logit)


def _balance(sums: RouterSums, top_k: int, balance: str, step: StepTotals) -> Tensor:
    """The microbatch's share in the balance loss of the step."""
    if balance != "global":
        share = sums.count[0] / step.tokens
        return share * load_balance_loss_from_sums(sums.load, sums.prob_sum, sums.count, top_k)
    load = sums.load if step.load is None else step.load
    return load_balance_loss_from_sums(load, sums.prob_sum, torch.full_like(sums.count, step.tokens), top_k)
