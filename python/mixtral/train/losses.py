"""The losses of the routers: balance and z-loss. Those of the vocabulary: cross_entropy.py.

Letters: T tokens, E experts, K top-k, L layers. Tokens without a loss are left out by selection: whatever they hold,
NaN too, changes no bit. docs/training.md has the equations.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops


class Convention(NamedTuple):
    """How a load-balancing loss counts. In each, P is the mean probability and the loss E * sum_e f_e P_e."""

    first_choice: bool  # f counts the best expert of a token alone, else all K
    share: bool  # f is divided by K: it sums to 1
    layers: str  # "sum" or "mean" of the layers' losses, or "pool": f and P over all layers first


CONVENTIONS = {
    "switch": Convention(first_choice=True, share=False, layers="sum"),
    "t5x": Convention(first_choice=False, share=False, layers="mean"),
    "hf": Convention(first_choice=False, share=False, layers="pool"),
    "megablocks": Convention(first_choice=False, share=True, layers="mean"),
    "mixtral": Convention(first_choice=False, share=True, layers="mean"),
}


def _convention(name: str) -> Convention:
    if name not in CONVENTIONS:
        raise ValueError(f"unknown load-balancing convention {name!r}: use one of {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]


class RouterSums(NamedTuple):
    """Sums over tokens of each layer's routing: :meth:`plus` adds microbatches, ``all_reduce`` of each adds ranks.

    A balance loss is a product of two means, and means do not add: form it from the sums of the whole step.
    """

    load: Tensor  # int64 [L, E], tokens that chose an expert
    prob_sum: Tensor  # f32 [L, E], with gradient
    z_sum: Tensor  # f32 [L], of (log sum exp)^2, with gradient
    count: Tensor  # int64 [L], tokens

    def plus(self, other: "RouterSums") -> "RouterSums":
        return RouterSums(*(a + b for a, b in zip(self, other, strict=True)))


def router_sums(
    router_logits: Sequence[Tensor],
    top_k: int,
    mask: Tensor | None = None,
    topk_ids: Sequence[Tensor] | None = None,
) -> RouterSums:
    """The sums of all layers, of router_logits L [T, E] and mask bool [T] (true: a token).

    ``load`` counts ``topk_ids`` L [T, K], by default the ``top_k`` largest logits. Raises ValueError if there is no
    layer, RuntimeError if a shape or dtype does not fit.
    """
    if len(router_logits) == 0:
        raise ValueError("router_sums: router_logits must hold the logits of at least one layer")
    if topk_ids is None:
        topk_ids = [ops.topk_softmax(logits.detach(), top_k)[1] for logits in router_logits]
    layers = [ops.router_losses(x, ids, mask) for x, ids in zip(router_logits, topk_ids, strict=True)]
    return RouterSums(*(torch.stack(sums) for sums in zip(*layers, strict=True)))


def load_balance_loss_from_sums(
    load: Tensor, prob_sum: Tensor, count: Tensor, top_k: int, convention: str = "mixtral"
) -> Tensor:
    """The load-balancing loss of sums, f32 []; 0 where there is no token.

    With ``load`` and ``count`` of a whole step and ``prob_sum`` of a microbatch it is that microbatch's share in it.

    Args:
        load: [L, E], of first choices for ``"switch"``, else of all K.
        prob_sum: f32 [L, E]; it carries the gradient.
        count: [L].
        top_k: K.
        convention: a key of :data:`CONVENTIONS`.

    Raises:
        ValueError: the convention is not known.
    """
    how = _convention(convention)
    if how.layers == "pool":
        load, prob_sum, count = (x.sum(0, keepdim=True) for x in (load, prob_sum, count))
    tokens = count.clamp(min=1).to(prob_sum.dtype)[:, None]
    chosen = load.to(prob_sum.dtype) / (tokens * (top_k if how.share else 1))
    layers = load.shape[1] * (chosen * (prob_sum / tokens)).sum(-1)
    return layers.sum() if how.layers == "sum" else layers.mean()


def load_balance_loss(
    router_logits: Sequence[Tensor],
    top_k: int,
    convention: str = "switch",
    mask: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """E * sum_e f_e P_e (Fedus et al., "Switch Transformers", 2021, eq. 4), f32 [], without its coefficient.

    f_e is the share of tokens that chose expert e, P_e the mean probability of e. Implementations differ in what f
    counts and in how layers are joined, by factors of K and L; values for balanced routing and for one pair of eight:

    ============  ==============================  ======================  ========  ================
    convention    f                               layers                  balanced  one pair
    "switch"      share of first choices          sum                     L         8 L (one expert)
    "t5x"         sums to K; mean over groups     mean                    K         8
    "hf"          sums to K                       f and P of all layers   K         8
    "megablocks"  counts / (T K)                  mean                    1         4
    "mixtral"     counts / (T K)                  mean                    1         4
    ============  ==============================  ======================  ========  ================

    Args:
        router_logits: L tensors [T, E], float.
        top_k: K.
        convention: a name of the table.
        mask: bool [T], true for a token, false for padding.
        groups: int [T], for ``"t5x"``: the loss is the mean over those of each group of tokens.

    Raises:
        ValueError: the convention is not known, groups are given for another than ``"t5x"``, or there is no layer.
        RuntimeError: a shape or dtype does not fit.
    """
    how = _convention(convention)
    if groups is not None and convention != "t5x":
        raise ValueError(f"load_balance_loss: groups are for the convention 't5x', not {convention!r}")
    if groups is not None:
        present = groups.unique() if mask is None else groups[mask].unique()
        parts = [groups == group if mask is None else mask & (groups == group) for group in present]
        return torch.stack([load_balance_loss(router_logits, top_k, convention, part) for part in parts]).mean()
    sums = router_sums(router_logits, 1 if how.first_choice else top_k, mask)
    return load_balance_loss_from_sums(sums.load, sums.prob_sum, sums.count, top_k, convention)


def z_loss_from_sums(z_sum: Tensor, count: Tensor) -> Tensor:
    """[L], [L] -> f32 []: the mean over tokens and layers; 0 where there is no token."""
    return (z_sum / count.clamp(min=1)).mean()


def z_loss(router_logits: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """mean over tokens and layers of (log sum_e exp x_e)^2 (Zoph et al., "ST-MoE", 2022, eq. 5), f32 [].

    Arguments and errors as in :func:`load_balance_loss`.
    """
    sums = router_sums(router_logits, 1, mask)
    return z_loss_from_sums(sums.z_sum, sums.count)
