"""moe_route against torch's linear, softmax and topk. Bound: one read of the tokens and of the router."""

import torch

import mixtral.ops as ops
from common import Bench, main, with_backward


def eager(x: torch.Tensor, router: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = torch.softmax(x.float() @ router.T, dim=-1).topk(top_k)
    return weights / weights.sum(-1, keepdim=True), ids


def run(bench: Bench) -> None:
    hidden, experts, top_k = 4096, 8, 2
    router = torch.randn(experts, hidden, device=bench.device)
    for tokens in (1, 64, 512, 4096):
        x = torch.randn(tokens, hidden, device=bench.device).bfloat16()
        bench.compare(
            f"T={tokens} H={hidden} E={experts} K={top_k} bfloat16",
            lambda x=x: ops.moe_route(x, router, top_k),
            {"torch": lambda x=x: eager(x, router, top_k)},
            gigabytes=(x.numel() * 2 + router.numel() * 4) / 1e9,
        )
        bench.compare(
            f"moe_route and backward T={tokens} H={hidden} E={experts} K={top_k} bfloat16",
            with_backward(lambda x, r: ops.moe_route(x, r, top_k)[0], x, router),
            {"torch": with_backward(lambda x, r: eager(x, r, top_k)[0], x, router)},
            gigabytes=(3 * x.numel() * 2 + 3 * router.numel() * 4) / 1e9,
        )


if __name__ == "__main__":
    main("moe_route", run)
