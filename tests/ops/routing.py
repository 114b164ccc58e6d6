"""Expert choices of every kind that a router produces, for the tests of the MoE ops."""

import torch

ROUTINGS = ["uniform", "zipf", "one expert", "half empty"]


def make_routing(kind: str, tokens: int, experts: int, top_k: int, device: str = "cpu") -> torch.Tensor:
    """int32 [T,K]; a row repeats an expert only where the kind leaves fewer than K of them."""
    rank = torch.arange(experts, dtype=torch.float64)
    probability = {
        "uniform": torch.ones(experts),
        "zipf": 1 / (rank + 1),
        "one expert": (rank == experts // 2).double(),
        "half empty": (rank % 2 == 0).double(),
    }[kind]
    if tokens == 0:
        return torch.empty(0, top_k, dtype=torch.int32, device=device)
    replacement = int((probability > 0).sum()) < top_k
    chosen = torch.multinomial(probability.expand(tokens, -1), top_k, replacement=replacement)
    return chosen.int().to(device)


def offsets(ids: torch.Tensor, experts: int) -> torch.Tensor:
    """End offsets int32 [E] of the copies in ``ids``."""
    return ids.flatten().long().bincount(minlength=experts).cumsum(0).int()
