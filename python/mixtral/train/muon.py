"""Muon: momentum whose update of a matrix is orthogonalised (Jordan et al., "Muon", 2024)."""

import torch
from torch import Tensor

from .. import ops

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic; it takes singular values to about [0.7, 1.2]
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, for matrices and stacks of them.

    The step has the root mean square of AdamW's, 0.2 (Liu et al., "Muon is Scalable for LLM Training", 2025, eq. 4), so
    that both take the same learning rate. ``torch.optim.Muon`` takes no stacks, which the weights of experts are, and
    the bits of its products depend on the number of threads.
    """

    def __init__(self, params: list[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - momentum)
                update = orthogonalize(p.grad.lerp(average, momentum))
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr * 0.2 * max(p.shape[-2:]) ** 0.5)


def orthogonalize(g: Tensor) -> Tensor:
    """[N, M] or [E, N, M], float -> f32, each matrix with about the singular vectors of ``g`` and singular values of 1.

    Newton-Schulz iterations X <- a X + (b XXᵀ + c (XXᵀ)²) X, in bf16.
    """
    a, b, c = _COEFFICIENTS
    stack = g if g.dim() == 3 else g[None]
    tall = stack.shape[-2] > stack.shape[-1]
    x = stack.mT if tall else stack  # [E, n, m], n <= m
    x = (x / (x.square().sum(-1).sum(-1)[:, None, None].sqrt() + 1e-7)).bfloat16()
    for _ in range(_ITERATIONS):
        square = product(x, x)  # symmetric
        polynomial = b * square + c * product(square, square)
        x = a * x + product(polynomial, x.mT)
    return (x.mT if tall else x).reshape(g.shape).float()


def product(x: Tensor, y: Tensor) -> Tensor:
    """[E, N, K], [E, M, K] -> [E, N, M]: x yᵀ of each pair, by the operator whose bits do not depend on threads."""
    experts, rows, _ = x.shape
    offs = torch.arange(1, experts + 1, dtype=torch.int32, device=x.device) * rows
    return ops.grouped_gemm(x.reshape(-1, x.shape[-1]), y.contiguous(), offs).view(experts, rows, -1)
