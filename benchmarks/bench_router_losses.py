"""router_losses against plain torch, alone and with backward. Bound: the logits and ids read, the gradient written."""

import torch

import mixtral.ops as ops
from common import Bench, main, with_backward


def eager(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    wide = logits.float()
    load = ids.flatten().bincount(minlength=logits.shape[1])
    return load, wide.softmax(-1).sum(0), wide.logsumexp(-1).square().sum()


def run(bench: Bench) -> None:
    top_k = 2
    for experts in (8, 64):
        for tokens in (128, 4096):
            logits = torch.randn(tokens, experts, device=bench.device)
            ids = ops.topk_softmax(logits, top_k)[1]
            case = f"T={tokens} E={experts} K={top_k} float32"
            gigabytes = (logits.numel() + ids.numel()) * 4 / 1e9
            bench.compare(
                f"router_losses {case}",
                lambda x=logits, i=ids: ops.router_losses(x, i),
                {"torch": lambda x=logits, i=ids: eager(x, i)},
                gigabytes=gigabytes,
            )
            bench.compare(
                f"router_losses and backward {case}",
                with_backward(lambda x, i=ids: ops.router_losses(x, i)[1:3], logits),
                {"torch": with_backward(lambda x, i=ids: eager(x, i)[1:], logits)},
                gigabytes=gigabytes + 2 * logits.numel() * 4 / 1e9,
            )


if __name__ == "__main__":
    main("router_losses", run)
