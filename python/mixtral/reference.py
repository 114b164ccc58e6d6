"""The mathematics of every op in plain PyTorch, written to be read.

Each function takes the arguments of the op of the same name, on any device and in any float dtype including f64, and
computes in the dtype it is given: in f64 it is the oracle of the tests, in bf16 or f16 the "plain PyTorch" whose error
the op is compared with. Nothing here is fast.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[T,H] -> [T,H]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = x.to(wide) * torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """[T,H], [T,H] -> normed [T,H], sum [T,H]."""
    total = x + residual
    return rms_norm(total, weight, eps), total
