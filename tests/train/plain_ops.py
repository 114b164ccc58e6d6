"""Until every op has its gradient: the ops that have none, computed by mixtral.reference while gradients are wanted."""

import functools

import torch

from mixtral import ops, reference


def install() -> None:
    def either(name, plain):
        op = getattr(ops, name)

        @functools.wraps(op)
        def call(*arguments, **options):
            return (plain if torch.is_grad_enabled() else op)(*arguments, **options)

        setattr(ops, name, call)

    if not hasattr(ops, "router_logits"):
        one = lambda x: torch.full((1,), len(x), dtype=torch.int32)  # noqa: E731
        ops.router_logits = lambda x, w: ops.grouped_gemm(x.to(w.dtype), w[None], one(x)).float()
        plain_moe_mlp, moe_mlp = reference.moe_mlp, ops.moe_mlp
        ops.moe_mlp = lambda *a, recompute="act": moe_mlp(*a)
        either("moe_mlp", lambda *a, recompute="act": plain_moe_mlp(*a))

        def topk_softmax(logits, top_k, renormalize=True, select_bias=None):
            ids = (logits.softmax(-1) + (0 if select_bias is None else select_bias)).topk(top_k, -1).indices
            weights = logits.softmax(-1).gather(1, ids)
            return weights / weights.sum(-1, keepdim=True) if renormalize else weights, ids.int()

        either("topk_softmax", topk_softmax)
        for name in "moe_permute moe_unpermute".split():
            either(name, getattr(reference, name))
