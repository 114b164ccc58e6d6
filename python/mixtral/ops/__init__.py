"""Typed wrappers over ``torch.ops.mixtral.*``: what each op computes, its fake kernel, its shapes and errors.

Importing this package loads ``libmixtral_ops.so`` and nothing else: the ops work alone, on CPU and CUDA tensors.
Letters: T tokens, H hidden, I intermediate, E experts, K top-k, Nq query heads, Nkv key/value heads, D head dim,
W window, B sequences, P page size, R page-table columns, M = T*K permuted rows. *float* is f32, bf16 or f16.
"""

from ._library import load_library

load_library()

from .grouped_gemm import grouped_gemm  # noqa: E402
from .moe_mlp import moe_mlp  # noqa: E402
from .moe_permute import moe_permute, moe_unpermute  # noqa: E402
from .moe_route import moe_route, router_logits  # noqa: E402
from .pack_weight import pack_weight, unpack_weight  # noqa: E402
from .rms_norm import add_rms_norm, rms_norm  # noqa: E402
from .rolling_kv_cache import (  # noqa: E402
    rolling_kv_cache_attention,
    rolling_kv_cache_rope_write,
    rolling_kv_cache_write,
)
from .rope import rope  # noqa: E402
from .router_losses import router_losses  # noqa: E402
from .sliding_window_attention import sliding_window_attention  # noqa: E402
from .swiglu import swiglu  # noqa: E402
from .topk_softmax import topk_softmax  # noqa: E402

__all__ = [
    "add_rms_norm",
    "grouped_gemm",
    "moe_mlp",
    "moe_permute",
    "moe_route",
    "moe_unpermute",
    "pack_weight",
    "rms_norm",
    "rolling_kv_cache_attention",
    "rolling_kv_cache_rope_write",
    "rolling_kv_cache_write",
    "rope",
    "router_logits",
    "router_losses",
    "sliding_window_attention",
    "swiglu",
    "topk_softmax",
    "unpack_weight",
]
