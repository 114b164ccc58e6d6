"""One matmul per expert in one call, over rows that are sorted by expert."""

from typing import Any

import torch
from torch import Tensor

from ._library import register_fake, register_no_second_backward
from .pack_weight import weight_columns, weight_depth


def grouped_gemm(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """``out[m] = b[e] @ a[m]`` for the rows ``offs[e-1] <= m < offs[e]``; sums in f32, rounded once.

    On the CPU the bits of a row do not depend on M, on its neighbours or on the number of threads.

    Args:
        a: [M, Kdim], float.
        b: [E, N, Kdim], the layout of ``torch.nn.Linear.weight``, dtype of ``a``; plain or packed
            (:func:`pack_weight`). Packed without quantisation it gives the bits of the plain one; a quantised one,
            for bf16 ``a`` alone, those of ``unpack_weight(b)``. With an fp8 one the rows of ``a`` are rounded to e4m3
            first, each with a power of two as its scale (``reference.round_rows_to_e4m3``); a row with inf or NaN is
            NaN throughout.
        offs: [E], int32 or int64 **end** offsets, as in ``torch.nn.functional.grouped_mm``.

    Returns:
        [M, N], dtype of ``a``.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; on the CPU, ``offs`` is negative, decreases or does not end
            at M. On CUDA rows behind ``offs[-1]`` are zero.

    Gradients, of the rows m of each expert e::

        grad_a[m] = b[e].T @ grad[m]
        grad_b[e] = sum_m outer(grad[m], a[m])     exact zeros for an expert without rows

    A packed ``b`` has no gradient, which is an error when it is asked for. That of ``a`` is then the one of
    ``unpack_weight(b)``, as if the rows of ``a`` had not been rounded.
    """
    return torch.ops.mixtral.grouped_gemm.default(a, b, offs)


@register_fake("grouped_gemm")
def _(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], weight_columns(b)))


@register_fake("grouped_gemm_backward_input")
def _(grad: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    return grad.new_empty((grad.shape[0], weight_depth(b)))


@register_fake("grouped_gemm_backward_weight")
def _(grad: Tensor, a: Tensor, offs: Tensor) -> Tensor:
    return grad.new_empty((offs.shape[0], grad.shape[1], a.shape[1]))


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    a, b, offs = inputs
    ctx.packed = b.dim() == 4
    ctx.save_for_backward(a if ctx.needs_input_grad[1] else None, b if ctx.needs_input_grad[0] else None, offs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    a, b, offs = ctx.saved_tensors
    if a is not None and ctx.packed:
        raise RuntimeError("grouped_gemm: b is packed and has no gradient; give the plain weight, or freeze it")
    grad_a = torch.ops.mixtral.grouped_gemm_backward_input(grad, b, offs) if b is not None else None
    grad_b = torch.ops.mixtral.grouped_gemm_backward_weight(grad, a, offs) if a is not None else None
    return grad_a, grad_b, None


torch.library.register_autograd("mixtral::grouped_gemm", _backward, setup_context=_save)
register_no_second_backward("grouped_gemm_backward_input")
register_no_second_backward("grouped_gemm_backward_weight")
