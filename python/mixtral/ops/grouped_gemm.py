"""One matmul per expert in one call, over rows that are sorted by expert."""

import torch
from torch import Tensor

from ._library import register_fake, register_no_backward
from .pack_weight import weight_columns


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
    """
    return torch.ops.mixtral.grouped_gemm.default(a, b, offs)


@register_fake("grouped_gemm")
def _(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], weight_columns(b)))


register_no_backward("grouped_gemm")
