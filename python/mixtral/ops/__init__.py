"""Typed wrappers over ``torch.ops.mixtral.*``: what each op computes, its fake kernel, its shapes and errors.

Importing this package loads ``libmixtral_ops.so`` and nothing else: the ops work alone, on CPU and CUDA tensors.
Letters: T tokens, H hidden, I intermediate, E experts, K top-k, Nq query heads, Nkv key/value heads, D head dim,
W window, B sequences, P page size, R page-table columns, M = T*K permuted rows. *float* is f32, bf16 or f16.
"""

from ._library import load_library

load_library()

from .rms_norm import add_rms_norm, rms_norm  # noqa: E402

__all__ = [
    "add_rms_norm",
    "rms_norm",
]
