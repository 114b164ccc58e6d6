"""The whole router: logits in the router's dtype, softmax, the K best experts (Mixtral of Experts, 2024, eq. 2)."""

import torch
from torch import Tensor

from ._library import register_fake, register_no_second_backward


def moe_route(
    x: Tensor, router: Tensor, top_k: int, renormalize: bool = True, select_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``topk_softmax(router_logits(x, router), ...)`` bit for bit, in one kernel.

    Args:
        x: [T, H], float.
        router: [E, H], f32 (Switch's selective precision) or the dtype of ``x`` (logits are rounded to it then).
        top_k: K, in [1, E].
        renormalize, select_bias: as in :func:`topk_softmax`.

    Returns:
        (topk_weights f32 [T, K], topk_ids int32 [T, K]), as :func:`topk_softmax` gives them.

    Raises:
        RuntimeError: a shape, dtype, device or ``top_k`` does not fit; on CUDA, more than 2048 experts.

    The gradients are those of :func:`topk_softmax`, then of :func:`router_logits`. The logits are computed again where
    they are needed, without renormalisation.
    """
    return torch.ops.mixtral.moe_route.default(x, router, top_k, renormalize, select_bias)


def router_logits(x: Tensor, router: Tensor) -> Tensor:
    """``x.to(router.dtype) @ router.T``: the first half of :func:`moe_route`, for losses that need the logits.

    Args:
        x: [T, H], float.
        router: [E, H], f32 or the dtype of ``x``.

    Returns:
        f32 [T, E]; sums in f32, rounded to the router's dtype.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; on CUDA, more than 2048 experts.

    With the gradient ``G`` [T, E] of the logits, ``grad_x = G @ router`` and ``grad_router = G.T @ x``: in f32, rounded
    once, and added in one order, whatever the number of threads. The rounding of the logits counts as the identity.
    """
    return torch.ops.mixtral.router_logits.default(x, router)


@register_fake("moe_route")
def _(
    x: Tensor, router: Tensor, top_k: int, renormalize: bool = True, select_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], top_k)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int32)


@register_fake("router_logits")
def _(x: Tensor, router: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], router.shape[0]), dtype=torch.float32)


def _empty_gradients(x: Tensor, router: Tensor, want_x: bool, want_router: bool) -> tuple[Tensor, Tensor]:
    hidden = x.shape[1]
    return x.new_empty(x.shape[0] if want_x else 0, hidden), router.new_empty(
        router.shape[0] if want_router else 0, hidden
    )


@register_fake("router_logits_backward")
def _(grad: Tensor, x: Tensor, router: Tensor, want_x: bool = True, want_router: bool = True) -> tuple[Tensor, Tensor]:
    return _empty_gradients(x, router, want_x, want_router)


@register_fake("moe_route_backward")
def _(
    grad: Tensor,
    x: Tensor,
    router: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    renormalize: bool = True,
    want_x: bool = True,
    want_router: bool = True,
) -> tuple[Tensor, Tensor]:
    return _empty_gradients(x, router, want_x, want_router)


def _wanted(gradients: tuple[Tensor, Tensor], wanted: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    return tuple(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))


def _setup_route(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, router, _, ctx.renormalize, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, router, *output)


def _route_backward(ctx, grad: Tensor | None, _: object) -> tuple:
    wanted = ctx.needs_input_grad[:2]
    if grad is None or not any(wanted):
        return None, None, None, None, None
    gradients = torch.ops.mixtral.moe_route_backward(grad, *ctx.saved_tensors, ctx.renormalize, *wanted)
    return *_wanted(gradients, wanted), None, None, None


def _setup_logits(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _logits_backward(ctx, grad: Tensor) -> tuple:
    wanted = ctx.needs_input_grad[:2]
    return _wanted(torch.ops.mixtral.router_logits_backward(grad, *ctx.saved_tensors, *wanted), wanted)


torch.library.register_autograd("mixtral::moe_route", _route_backward, setup_context=_setup_route)
torch.library.register_autograd("mixtral::router_logits", _logits_backward, setup_context=_setup_logits)
register_no_second_backward("moe_route_backward")
register_no_second_backward("router_logits_backward")
