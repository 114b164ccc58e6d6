"""Weights laid out once for the CPU kernels, optionally quantised; the matmul ops take them in place of plain ones."""

import torch
from torch import Tensor

from ._library import register_fake, register_no_backward

ROW_SCALED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # formats with one scale a row


def pack_weight(weight: Tensor, quantize: str | None = None, scales: Tensor | None = None) -> Tensor:
    """The rows of ``weight`` in the order in which the CPU kernels read them, 32 rows to a block.

    ``grouped_gemm`` and ``moe_mlp`` take the result in place of ``weight``; shape and dtype tell the format. Only the
    format without quantisation gives the bits of the plain weight; fp8 and int4 stand for what :func:`unpack_weight`
    returns, and so does int8 on CUDA, while the CPU multiplies by q and each finished sum by the scale, without a
    rounding between. Quantised weights go with bf16 inputs alone.

    An fp8 scale is the least power of two that keeps its row within 448, the largest e4m3 value, and at least 2^-117;
    rows that meet an fp8 weight are rounded in the same way (:func:`grouped_gemm`). An int4 scale is a power of the
    square root of two: of the smallest that covers all 32 weights and the two below it, the one with the least squared
    error. There is no zero among its levels: zeros become half a scale, 2^-65 where all 32 are zero.

    ========  ===================================  ==========================================================
    quantize  packed                               a weight is
    ========  ===================================  ==========================================================
    None      [E, N/32, Kdim/32, 1024], its dtype  itself
    "int8"    int8 [E, N/32, 32 * Kdim + 128]      f32 scale of its row * q, -127 <= q <= 127
    "fp8"     float8_e4m3fn, shape as "int8"       f32 scale of its row, a power of two * e4m3, exact in bf16
    "int4"    uint8 [E, N/32, Kdim/32, 544]        scale of 32 depths of its row * (q + 1/2), -8 <= q <= 7, in bf16
    ========  ===================================  ==========================================================

    Args:
        weight: [E, N, Kdim], float, N and Kdim multiples of 32.
        quantize: None, "int8", "fp8" or "int4".
        scales: uint8 [E, N, Kdim/32], with "int4" alone: the scale byte of each 32 depths of a row, byte e for
            2^(e / 2 - 64), where it was chosen elsewhere.

    Returns:
        The packed weight: as many bytes as ``weight`` without quantisation, 1 byte a value and 4 a row with "int8"
        and "fp8", 4.25 bits a value with "int4".

    Raises:
        RuntimeError: a shape, dtype or format does not fit; a weight to be quantised is not below 2^66 in magnitude;
            ``weight`` is on CUDA: pack on the CPU and move the result, which serves on both.
    """
    return torch.ops.mixtral.pack_weight.default(weight, quantize, scales)


def unpack_weight(packed: Tensor) -> Tensor:
    """The weight that ``packed`` stands for: what was packed, or that of a quantised one, rounded to bf16.

    Args:
        packed: as from :func:`pack_weight`.

    Returns:
        [E, N, Kdim], dtype of ``packed``, bf16 when quantised.

    Raises:
        RuntimeError: the shape or dtype is not that of a packed weight.
    """
    return torch.ops.mixtral.unpack_weight.default(packed)


def weight_columns(weight: Tensor) -> int:
    """N of a plain or packed weight."""
    packed = weight.dim() == 4 or weight.dtype in ROW_SCALED.values()
    return weight.shape[1] * (32 if packed else 1)


def weight_depth(weight: Tensor) -> int:
    """Kdim of a plain or packed weight."""
    if weight.dtype in ROW_SCALED.values():
        return (weight.shape[2] - 128) // 32
    return weight.shape[2] * (32 if weight.dim() == 4 else 1)


@register_fake("pack_weight")
def _(weight: Tensor, quantize: str | None = None, scales: Tensor | None = None) -> Tensor:
    experts, columns, depth = weight.shape
    if quantize in ROW_SCALED:
        return weight.new_empty((experts, columns // 32, 32 * depth + 128), dtype=ROW_SCALED[quantize])
    if quantize == "int4":
        return weight.new_empty((experts, columns // 32, depth // 32, 544), dtype=torch.uint8)
    return weight.new_empty((experts, columns // 32, depth // 32, 1024))


@register_fake("unpack_weight")
def _(packed: Tensor) -> Tensor:
    dtype = packed.dtype if packed.dtype.is_floating_point and packed.dim() == 4 else torch.bfloat16
    return packed.new_empty((packed.shape[0], weight_columns(packed), weight_depth(packed)), dtype=dtype)


register_no_backward("pack_weight")
register_no_backward("unpack_weight")
