"""moe_mlp against Hugging Face's eager experts: a loop over the experts that gathers, multiplies and adds."""

import torch
import torch.nn.functional as F

import mixtral.ops as ops
from common import Bench, main


def eager(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    out = torch.zeros_like(x)
    for e in range(len(gate_up)):
        tokens, choice = torch.where(ids == e)
        if len(tokens):
            gate, up = F.linear(x[tokens], gate_up[e]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, down[e]) * weights[tokens, choice, None]
            out.index_add_(0, tokens, y.to(x.dtype))
    return out


def run(bench: Bench) -> None:
    hidden, intermediate, experts, top_k = 2048, 7168, 8, 2
    for dtype in (torch.float32, torch.bfloat16):
        gate_up = torch.randn(experts, 2 * intermediate, hidden, device=bench.device).to(dtype) / hidden**0.5
        down = torch.randn(experts, hidden, intermediate, device=bench.device).to(dtype) / intermediate**0.5
        for tokens in (1, 4, 128, 512):
            x = torch.randn(tokens, hidden, device=bench.device).to(dtype)
            weights, ids = ops.topk_softmax(torch.randn(tokens, experts, device=bench.device), top_k)
            expert_elements = 3 * hidden * intermediate
            # Few tokens are bound by reading the weights of the chosen experts, many by arithmetic.
            if tokens < 64:
                work = {"gigabytes": len(ids.unique()) * expert_elements * x.element_size() / 1e9}
            else:
                work = {"gflop": 2 * tokens * top_k * expert_elements / 1e9}
            bench.compare(
                f"T={tokens} H={hidden} I={intermediate} E={experts} K={top_k} {dtype}",
                lambda x=x, w=weights, i=ids, g=gate_up, d=down: ops.moe_mlp(x, w, i, g, d),
                lambda x=x, w=weights, i=ids, g=gate_up, d=down: eager(x, w, i, g, d),
                "torch eager",
                **work,
            )


if __name__ == "__main__":
    main("moe_mlp", run)
