"""Cross-entropy over the vocabulary, with labels or with the probabilities of a teacher.

Letters: T tokens, H hidden, V vocabulary. Tokens without a loss are left out by selection: whatever they hold, NaN too,
changes no bit. docs/training.md has the equations.
"""

import torch
from torch import Tensor
from torch.nn import functional

from .. import ops

IGNORED = -100  # the label of a token without a loss

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
) -> tuple[Tensor, Tensor]:
    """f32 logits [n, V], labels [n], weights [n] -> f32 [], with plain autograd, and its hard part, without."""
    loss = hard = functional.cross_entropy(logits, labels, reduction="none")
    if teacher is not None:
        values, ids = teacher if isinstance(teacher, tuple) else (teacher, None)
        target = torch.softmax(values.float() / temperature, -1)
        log_p = torch.log_softmax(logits / temperature, -1)
        soft = -(target * (log_p if ids is None else log_p.gather(1, ids.long()))).sum(-1)
        loss = (1 - alpha) * hard + alpha * temperature**2 * soft
    mixed, alone = ((x if weights is None else weights * x).sum() for x in (loss, hard.detach()))
    return mixed, alone


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """[n, H], [V, H] -> f32 [n, V]: the product that the model's own logits come from."""
    offs = torch.full((1,), len(hidden), dtype=torch.int32, device=hidden.device)
    return ops.grouped_gemm(hidden, weight[None], offs).float()


class _LinearLoss(torch.autograd.Function):
    """``_sum_of_losses`` of hidden [n, H] through the vocabulary's matrix [V, H], chunk by chunk of rows.

    A chunk's gradients are computed with its loss: its logits are made one time and then forgotten.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, weights, teacher, alpha, temperature, grad_enabled):
        wanted = [grad_enabled and needed for needed in ctx.needs_input_grad[:2]]
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        totals = torch.zeros(2, dtype=torch.float64, device=hidden.device)
        rows = min(MAX_CHUNK_ROWS, max(1, CHUNK_LOGITS // len(weight)))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            of_part = (labels[part], None if weights is None else weights[part], _teacher_rows(teacher, part))
            leaves = [x.detach().requires_grad_(want) for x, want in zip((hidden[part], weight), wanted, strict=True)]
            with torch.set_grad_enabled(any(wanted)):
                loss, hard = _sum_of_losses(_logits(*leaves), *of_part, alpha, temperature)
            totals += torch.stack([loss.detach(), hard])
            if any(wanted):
                grads = list(torch.autograd.grad(loss, [x for x in leaves if x.requires_grad]))
                if wanted[1]:
                    grad_weight += grads.pop()
                if wanted[0]:
                    grad_hidden[part] = grads.pop()
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        total, hard = totals.float().unbind()
        hard = hard.clone()
        ctx.mark_non_differentiable(hard)
        return total.clone(), hard

    @staticmethod
    def backward(ctx, grad, _):
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
    loss, _ = _LinearLoss.apply(
        hidden[rows], weight, labels[rows].long(), weights, None, 0.0, 1.0, torch.is_grad_enabled()
    )
    return loss


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
    return distill_cross_entropies(student, teacher, labels, weights, alpha, temperature)[0]


def distill_cross_entropies(
    student: Tensor | tuple[Tensor, Tensor],
    teacher: Teacher,
    labels: Tensor,
    weights: Tensor | None = None,
    alpha: float = 0.25,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """:func:`distill_cross_entropy`, and sum_t weights[t] * hard_t, f32 [], without a gradient: from one product."""
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
