"""topk_softmax against torch.softmax, topk and the division. Bound: one read of the logits, one write of the choice."""

import torch

import mixtral.ops as ops
from common import Bench, main, with_backward


def eager(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = torch.softmax(logits.float(), dim=-1).topk(top_k)
    return weights / weights.sum(-1, keepdim=True), ids


def run(bench: Bench) -> None:
    experts, top_k = 8, 2
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (1, 128, 4096):
            logits = torch.randn(tokens, experts, device=bench.device).to(dtype)
            bench.compare(
                f"T={tokens} E={experts} K={top_k} {dtype}",
                lambda x=logits: ops.topk_softmax(x, top_k),
                {"torch": lambda x=logits: eager(x, top_k)},
                gigabytes=tokens * (experts * logits.element_size() + top_k * 8) / 1e9,
            )
            bench.compare(
                f"topk_softmax and backward T={tokens} E={experts} K={top_k} {dtype}",
                with_backward(lambda x: ops.topk_softmax(x, top_k)[0], logits),
                {"torch": with_backward(lambda x: eager(x, top_k)[0], logits)},
                gigabytes=tokens * (3 * experts * logits.element_size() + 2 * top_k * 8) / 1e9,
            )


if __name__ == "__main__":
    main("topk_softmax", run)
