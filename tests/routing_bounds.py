"""Error bounds, as in error_bounds.py, of the gradients of routing and permutation, and of the router's losses."""

import torch
from torch import Tensor

from error_bounds import EXP, SECOND_ORDER, U, moe_unpermute_bound, rounded, topk_softmax_bound
from mixtral import reference


def topk_softmax_backward_bound(
    grad: Tensor,
    router_logits: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    renormalize: bool = True,
    weights_error: Tensor | float = 0.0,
) -> Tensor:
    """``weights_error``: the error of topk_weights itself, which are then exact, in f64."""
    grad, weights, logits, ids = grad.double(), topk_weights.double(), router_logits.double(), topk_ids.long()
    own, mean = torch.zeros_like(logits).scatter(1, ids, grad.abs()), (grad * weights).abs().sum(-1, keepdim=True)
    p, p_error = torch.zeros_like(logits).scatter(1, ids, weights), 0.0
    if not renormalize:
        p = logits.softmax(-1)
        exp_error = U * (logits.amax(-1, keepdim=True) - logits) + EXP
        p_error = exp_error + exp_error.mul(p).sum(-1, keepdim=True) + (logits.shape[1] / 32 + 6) * U
    inherited = torch.zeros_like(logits).scatter(1, ids, weights_error * torch.ones_like(weights)) * (own + mean)
    inherited = inherited + p * (grad.abs() * weights_error).sum(-1, keepdim=True)
    error = inherited + p * (own + mean) * (p_error + (ids.shape[1] + 3) * U)
    exact = reference.topk_softmax_backward(grad, logits, weights, ids, renormalize)
    return rounded(exact, error * SECOND_ORDER, router_logits.dtype)


def topk_softmax_gradient_bound(
    grad: Tensor, router_logits: Tensor, top_k: int, renormalize: bool = True
) -> tuple[Tensor]:
    """Of autograd: the weights are those of the forward pass."""
    choice = reference.topk_softmax(router_logits.double(), top_k, renormalize)
    error = topk_softmax_bound(router_logits, top_k, renormalize)
    return (topk_softmax_backward_bound(grad, router_logits, *choice, renormalize, error),)


def router_logits_backward_bound(
    grad: Tensor, x: Tensor, router: Tensor, grad_error: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``grad_error``: the error of grad itself, which is then exact, in f64."""
    wide = grad.double(), x.double(), router.double()
    exact, sizes = reference.router_logits_backward(*wide), reference.router_logits_backward(*(y.abs() for y in wide))
    inherited = 0.0, 0.0
    if grad_error is not None:
        inherited = reference.router_logits_backward(grad_error, wide[1].abs(), wide[2].abs())
    tokens, experts = grad.shape
    additions = experts, min(tokens, 256) + -(-tokens // 256) if not x.is_cuda else -(-tokens // 8) + 8
    return tuple(
        rounded(value, ((count + 1) * U * size + before) * SECOND_ORDER, like.dtype)
        for value, size, before, count, like in zip(exact, sizes, inherited, additions, (x, router), strict=True)
    )


def moe_route_gradient_bound(
    grad: Tensor, x: Tensor, router: Tensor, top_k: int, renormalize: bool = True
) -> tuple[Tensor, Tensor]:
    """Of autograd, where the logits are exact."""
    logits = x.double() @ router.double().T
    choice = reference.topk_softmax(logits, top_k, renormalize)
    exact = reference.topk_softmax_backward(grad.double(), logits, *choice, renormalize)
    (error,) = topk_softmax_gradient_bound(grad, logits.float(), top_k, renormalize)
    return router_logits_backward_bound(exact, x, router, error)


def moe_permute_backward_bound(grad: Tensor, row_map: Tensor) -> Tensor:
    return moe_unpermute_bound(grad, torch.ones(row_map.shape, device=grad.device), row_map)


def moe_unpermute_backward_bound(
    grad: Tensor, y: Tensor, topk_weights: Tensor, row_map: Tensor
) -> tuple[Tensor, Tensor]:
    wide, hidden = (grad.double(), y.double(), topk_weights.double(), row_map), y.shape[1]
    exact, sizes = (
        reference.moe_unpermute_backward(*wide),
        reference.moe_unpermute_backward(*(x.abs() for x in wide[:3]), row_map),
    )
    additions = min(hidden, max(-(-hidden // 16) + 4, -(-hidden // 256) + 10))  # CPU: 16 lanes, a tree; CUDA: 256
    grad_y = rounded(exact[0], U * exact[0].abs(), y.dtype)
    return grad_y, (additions + 1) * U * SECOND_ORDER * sizes[1]


def router_losses_bound(
    router_logits: Tensor, topk_ids: Tensor, mask: Tensor | None = None
) -> tuple[None, Tensor, Tensor, None]:
    logits = router_logits.double() if mask is None else router_logits.double()[mask]
    additions = -(-len(logits) // 256) + 9 if logits.is_cuda else 1  # the CPU adds in f64
    p, lse, below = logits.softmax(-1), logits.logsumexp(-1), logits.amax(-1, keepdim=True) - logits
    exp_error = U * below + EXP
    total_error = (p * exp_error).sum(-1, keepdim=True) + (logits.shape[1] / 32 + 6) * U
    lse_error = total_error[:, 0] + 4 * U * (1 + lse.abs())
    prob_sum = (p * (exp_error + total_error + (additions + 1) * U)).sum(0)
    z_sum = (lse_error * (2 * lse.abs() + lse_error) + additions * U * lse.square()).sum()
    return None, prob_sum * SECOND_ORDER, (z_sum + U * lse.square().sum()) * SECOND_ORDER, None


def router_losses_backward_bound(
    grad_prob_sum: Tensor, grad_z_sum: Tensor, router_logits: Tensor, mask: Tensor | None = None
) -> Tensor:
    wide = grad_prob_sum.double(), grad_z_sum.double(), router_logits.double(), mask
    logits, a, b = wide[2], wide[0].abs(), wide[1].abs()
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None], 0)  # whose gradient is 0, as is its rounding
    p, lse, below = logits.softmax(-1), logits.logsumexp(-1, keepdim=True), logits.amax(-1, keepdim=True) - logits
    exp_error = U * below + EXP
    total_error = (p * exp_error).sum(-1, keepdim=True) + (logits.shape[1] / 32 + 6) * U
    relative = exp_error + total_error + (logits.shape[1] / 32 + 10) * U
    size = p * (a + (a * p).sum(-1, keepdim=True) + 2 * b * lse.abs())
    error = 2 * size * relative + 2 * p * b * (total_error + 4 * U * (1 + lse.abs()))
    return rounded(reference.router_losses_backward(*wide), error * SECOND_ORDER, router_logits.dtype)
