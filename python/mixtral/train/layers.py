"""The layers of ``train.Mixtral``: thin modules on ``mixtral.ops`` with the names of Hugging Face transformers 5.

The calls and their order are those of the C++ model (csrc/model). Letters as in ``mixtral.ops``.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..model import Config
from .batch import Batch
from .options import RouterOptions

Routing = tuple[Tensor, Tensor]  # of a layer: logits f32 [T, E], the experts chosen int32 [T, K]


class Linear(nn.Linear):
    """x [T, in] -> [T, out], as a grouped product of one group."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.grouped_gemm(x, self.weight[None], torch.full((1,), len(x), dtype=torch.int32, device=x.device))


class RMSNorm(nn.Module):
    """x, residual [T, H] -> the norm of their sum, and the sum."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            return ops.rms_norm(x, self.weight, self.eps), x
        return ops.add_rms_norm(x, residual, self.weight, self.eps)


class Attention(nn.Module):
    """x [T, H] -> [T, H]: grouped-query attention within each sequence, with the model's window."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim, self.theta, self.window = config.head_dim, config.rope_theta, config.window
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, queries, bias=False)
        self.k_proj = Linear(config.hidden_size, keys, bias=False)
        self.v_proj = Linear(config.hidden_size, keys, bias=False)
        self.o_proj = Linear(queries, config.hidden_size, bias=False)

    def forward(self, x: Tensor, positions: Tensor, cu_seqlens: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = ops.rope(q, k, positions, self.theta)
        return self.o_proj(ops.sliding_window_attention(q, k, v, cu_seqlens, cu_seqlens, self.window).flatten(1))


class Router(nn.Module):
    """x [T, H] -> logits f32 [T, E], weights f32 [T, K], experts int32 [T, K]."""

    def __init__(self, config: Config, options: RouterOptions) -> None:
        super().__init__()
        self.top_k, self.renormalize, self.in_f32 = config.top_k, config.renormalize, config.router_in_f32
        self.jitter, self.num_experts = options.jitter, config.num_experts
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.select_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        trains = self.training and torch.is_grad_enabled() and self.weight.requires_grad
        if trains and self.top_k == 1 and self.renormalize and self.num_experts > 1:
            raise ValueError(
                "a router of one expert per token cannot be trained with renormalised weights: the weight is always 1, "
                "so no gradient of the loss reaches it; set norm_topk_prob to false, as in Switch Transformers"
            )
        weight = self.weight.float() if self.in_f32 else self.weight.to(x.dtype)
        if self.training and self.jitter > 0:
            x = x.to(weight.dtype)
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = ops.router_logits(x, weight)
        bias = self.e_score_correction_bias  # in f32, whatever the model was converted to
        bias = None if bias is None else bias.float()
        return logits, *ops.topk_softmax(logits, self.top_k, self.renormalize, bias)


class Experts(nn.Module):
    """x [T, H], weights f32 [T, K], ids int32 [T, K] -> [T, H]: the weighted sum of the chosen experts."""

    def __init__(self, config: Config, options: RouterOptions, recompute: str) -> None:
        super().__init__()
        self.dropout, self.recompute = options.expert_dropout, recompute
        shape = config.num_experts, config.intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(shape[0], 2 * shape[1], shape[2]))
        self.down_proj = nn.Parameter(torch.empty(shape[0], shape[2], shape[1]))

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        if not (self.training and self.dropout > 0):
            return ops.moe_mlp(x, weights, ids, self.gate_up_proj, self.down_proj, recompute=self.recompute)
        permuted, offs, row_map = ops.moe_permute(x, ids, len(self.gate_up_proj))
        activated = functional.dropout(ops.swiglu(ops.grouped_gemm(permuted, self.gate_up_proj, offs)), self.dropout)
        return ops.moe_unpermute(ops.grouped_gemm(activated, self.down_proj, offs), weights, row_map)


class SparseMoe(nn.Module):
    """x [T, H] -> [T, H] and the routing."""

    def __init__(self, config: Config, options: RouterOptions, recompute: str) -> None:
        super().__init__()
        self.gate, self.experts = Router(config, options), Experts(config, options, recompute)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        logits, weights, ids = self.gate(x)
        return self.experts(x, weights, ids), (logits, ids)


class DenseMlp(nn.Module):
    """x [T, H] -> [T, H], as in Mistral 7B; no routing."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.down_proj(ops.swiglu(torch.cat((self.gate_proj(x), self.up_proj(x)), -1))), None


class DecoderLayer(nn.Module):
    """The residual stream x + residual -> the same, and the routing."""

    def __init__(self, config: Config, options: RouterOptions, recompute: str) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SparseMoe(config, options, recompute) if config.is_moe else DenseMlp(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, residual: Tensor | None, positions: Tensor, cu_seqlens: Tensor):
        normed, residual = self.input_layernorm(x, residual)
        normed, residual = self.post_attention_layernorm(self.self_attn(normed, positions, cu_seqlens), residual)
        out, routing = self.mlp(normed)
        return out, residual, routing


class Decoder(nn.Module):
    """Embedding, layers and last norm: a batch -> hidden states [T, H] and the routing of every sparse layer."""

    def __init__(self, config: Config, options: RouterOptions, recompute: str) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, options, recompute) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, batch: Batch, gradient_checkpointing: bool) -> tuple[Tensor, list[Routing]]:
        x, residual, routings = self.embed_tokens(batch.input_ids), None, []
        for layer in self.layers:
            inputs = x, residual, batch.positions, batch.cu_seqlens
            if gradient_checkpointing and torch.is_grad_enabled():
                x, residual, routing = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x, residual, routing = layer(*inputs)
            routings += [routing] if routing else []
        return self.norm(x, residual)[0], routings
