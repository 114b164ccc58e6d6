"""The losses of training: balance and z-loss of the routers, cross-entropy of the vocabulary.

Letters: T tokens, E experts, K top-k, L layers, H hidden, V vocabulary. Tokens without a loss are left out by
selection: whatever they hold, NaN too, changes no bit. docs/training.md has the equations.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .. import ops

IGNORED = -100  # the label of a token without a loss


# ---- routers ---------------------------------------------------------------------------------------------------------


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


# ---- vocabulary ------------------------------------------------------------------------------------------------------

CHUNK_LOGITS = 2**23  # a chunk of rows holds at most so many logits: 32 MiB in f32
# Sums of fewer than 2^15 numbers are made by one thread, so that their bits do not depend on the number of threads.
MAX_CHUNK_ROWS = 4096

Teacher = Tensor | tuple[Tensor, Tensor]


def _teacher_rows(teacher: Teacher | None, rows: Tensor | slice) -> Teacher | None:
    if teacher is None:
        return None
    return tuple(part.detach()[rows] for part in teacher) if isinstance(teacher, tuple) else teacher.detach()[rows]


def _sum_of_losses(
    logits: Tensor, labels: Tensor, weights: Tensor | None, teacher: Teacher | None, alpha: float, temperature: float
) -> Tensor:
    """f32 logits [n, V], labels [n], weights [n] -> f32 [], with plain autograd."""
    loss = functional.cross_entropy(logits, labels, reduction="none")
    if teacher is not None:
        values, ids = teacher if isinstance(teacher, tuple) else (teacher, None)
        target = torch.softmax(values.float() / temperature, -1)
        log_p = torch.log_softmax(logits / temperature, -1)
        soft = -(target * (log_p if ids is None else log_p.gather(1, ids.long()))).sum(-1)
        loss = (1 - alpha) * loss + alpha * temperature**2 * soft
    return (loss if weights is None else weights * loss).sum()


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """[n, H], [V, H] -> f32 [n, V]: the product that the model's own logits come from."""
    offs = torch.full((1,), len(hidden), dtype=torch.int32, device=hidden.device)
    return ops.grouped_gemm(hidden, weight[None], offs).float()


class _LinearLoss(torch.autograd.Function):
    """The loss of hidden [n, H] through the vocabulary's matrix [V, H], chunk by chunk of rows.

    A chunk's gradients are computed with its loss: its logits are made one time and then forgotten.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, weights, teacher, alpha, temperature, grad_enabled):
        wanted = [grad_enabled and needed for needed in ctx.needs_input_grad[:2]]
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        rows = min(MAX_CHUNK_ROWS, max(1, CHUNK_LOGITS // len(weight)))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            of_part = (labels[part], None if weights is None else weights[part], _teacher_rows(teacher, part))
            leaves = [x.detach().requires_grad_(want) for x, want in zip((hidden[part], weight), wanted, strict=True)]
            with torch.set_grad_enabled(any(wanted)):
                loss = _sum_of_losses(_logits(*leaves), *of_part, alpha, temperature)
            total += loss.detach()
            if any(wanted):
                grads = list(torch.autograd.grad(loss, [x for x in leaves if x.requires_grad]))
                if wanted[1]:
                    grad_weight += grads.pop()
                if wanted[0]:
                    grad_hidden[part] = grads.pop()
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return total.float()

    @staticmethod
    def backward(ctx, grad):
        both = [None if x is None else (x * grad).to(ctx.dtype) for x in ctx.saved_tensors]
        return *both, *[None] * 6


def _selected(labels: Tensor, rows: int, name: str) -> Tensor:
    if labels.dim() != 1 or len(labels) != rows or labels.is_floating_point():
        raise ValueError(f"{name}: labels must be integers [{rows}], got {labels.dtype} {list(labels.shape)}")
    return (labels != IGNORED).nonzero()[:, 0]


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum_t weights[t] * -log softmax(weight @ hidden[t])[labels[t]], f32 [], without ever holding [T, V] logits.

    The logits are those of the model: products in its dtype, then f32. On the CPU neither value nor gradient depends
    on the number of threads. Divide by the number of targets of the whole step.

    Args:
        hidden: [T, H], float; the states after the last norm.
        weight: [V, H], dtype of ``hidden``; the matrix of ``lm_head``.
        labels: int [T], in [0, V); -100 for a token without a loss.
        weights: f32 [T], of the targets.

    Raises:
        ValueError: ``labels`` is not of integers [T].
        RuntimeError: another shape or dtype does not fit.
    """
    rows = _selected(labels, len(hidden), "linear_cross_entropy")
    weights = None if weights is None else weights[rows]
    return _LinearLoss.apply(
        hidden[rows], weight, labels[rows].long(), weights, None, 0.0, 1.0, torch.is_grad_enabled()
    )


def distill_cross_entropy(
    student: Tensor | tuple[Tensor, Tensor],
    teacher: Teacher,
    labels: Tensor,
    weights: Tensor | None = None,
    alpha: float = 0.25,
    temperature: float = 1.0,
) -> Tensor:
    """sum_t weights[t] * ((1 - alpha) * hard_t + alpha * soft_t), f32 [] (Switch Transformers, 2021, section 4.2).

    hard_t is the cross-entropy with the label; soft_t = -tau^2 * sum_v q_v log softmax(student / tau)_v with
    q = softmax(teacher / tau), where the factor keeps the size of the gradient (Hinton et al., 2015, section 2).

    Args:
        student: logits [T, V], float, or (hidden [T, H], weight [V, H]), which are multiplied a chunk of rows at a
            time, as in :func:`linear_cross_entropy`.
        teacher: logits [T, V], float, or the best m of them, (values [T, m], ids int [T, m]): logits or
            log-probabilities, renormalised over the m.
        labels: int [T]; -100 for a token without either loss.
        weights: f32 [T], of the targets.
        alpha: share of the soft loss, in [0, 1].
        temperature: tau, > 0.

    Raises:
        ValueError: ``labels`` is not of integers [T], or alpha or temperature is outside its range.
        RuntimeError: another shape or dtype does not fit.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"distill_cross_entropy: alpha must be in [0, 1], got {alpha}")
    if not temperature > 0:
        raise ValueError(f"distill_cross_entropy: temperature must be > 0, got {temperature}")
    first = student[0] if isinstance(student, tuple) else student
    rows = _selected(labels, len(first), "distill_cross_entropy")
    chosen = (labels[rows].long(), None if weights is None else weights[rows], _teacher_rows(teacher, rows))
    if isinstance(student, tuple):
        return _LinearLoss.apply(first[rows], student[1], *chosen, alpha, temperature, torch.is_grad_enabled())
    return _sum_of_losses(student[rows].float(), *chosen, alpha, temperature)
