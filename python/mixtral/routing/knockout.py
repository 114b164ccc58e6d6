"""What experts are for: how much worse the model predicts without one, and with other numbers of experts."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from .statistics import CONFIDENCE

if TYPE_CHECKING:
    from ..model import Mixtral
    from ..trace import Trace

RUN = 32  # tokens that are one unit of the interval


def knockout(
    model: "Mixtral",
    trace: "Trace",
    tokens: int,
    layers: list[int],
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """{"layers": {layer: ...}, "experts_per_token": ...} on the first documents of each domain.

    ``delta`` is the rise of the negative log-likelihood, in nats per token, when the output of one expert is zero; the
    others keep their weights. ``half_width`` is of its 99 % interval, over runs of 32 tokens. ``similarity`` is the
    cosine between the expert's weights and the mean of the layer's experts. ``nll`` is that of the whole model with K
    = 1 to E experts per token.

    Args:
        model: with plain weights (``pack=False``); they are changed and restored.
        tokens: how many are scored, at least; whole documents.

    Raises:
        ValueError: quantised weights.
    """
    if model.weight_type not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--knockout: expected weights in float32, bfloat16 or float16, got {model.weight_type}")
    documents = _documents(trace, tokens)
    parameters = model.named_parameters()
    steps, done = len(layers) * trace.num_experts + trace.num_experts, 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, steps)

    whole = _nll(model, documents)
    found = {}
    for layer in layers:
        down = parameters[f"layers.{layer}.moe.down_proj"]  # [E, H, I]
        gate_up = parameters[f"layers.{layer}.moe.gate_up_proj"]  # [E, 2I, H]
        changes = []
        for expert in range(trace.num_experts):
            kept = down[expert].clone()
            try:
                down[expert] = 0
                changes.append(_nll(model, documents) - whole)
            finally:
                down[expert] = kept
            step()
        found[layer] = {
            "delta": [float(change.mean()) for change in changes],
            "half_width": [_half_width(change) for change in changes],
            "similarity": _similarity(gate_up, down),
        }
    nll = []
    for k in range(1, trace.num_experts + 1):
        nll.append(_nll_of_k(model, documents, k))
        step()
    return {"layers": found, "experts_per_token": {"k": list(range(1, trace.num_experts + 1)), "nll": nll}}


def _documents(trace: "Trace", tokens: int) -> list[Tensor]:
    """Ids [n] of the first documents of every domain, in equal parts."""
    docs, domains = trace.docs, trace.domains
    share = tokens / len(trace.domain_names)
    chosen = []
    for domain in range(len(trace.domain_names)):
        taken = 0
        for doc in docs[domains == domain].unique().tolist():
            if taken >= share:
                break
            chosen.append(trace.token_ids[docs == doc].long())
            taken += len(chosen[-1])
    return chosen


def _nll(model: "Mixtral", documents: list[Tensor]) -> np.ndarray:
    """Of every token but the first of each document, in nats."""
    losses = [
        cross_entropy(model(ids[None].to(model.device))[0, :-1].cpu(), ids[1:], reduction="none") for ids in documents
    ]
    return torch.cat(losses).double().numpy()


def _nll_of_k(model: "Mixtral", documents: list[Tensor], k: int) -> float:
    trace = model.trace([ids.tolist() for ids in documents], experts_per_token=k)
    logits = model.replay(trace)
    inside = trace.docs[1:] == trace.docs[:-1]
    return float(cross_entropy(logits[:-1][inside], trace.token_ids[1:][inside].long()))


def _half_width(change: np.ndarray) -> float:
    runs = [run.mean() for run in np.array_split(change, max(len(change) // RUN, 2))]
    return float(stats.sem(runs) * stats.t.ppf((1 + CONFIDENCE) / 2, len(runs) - 1))


def _similarity(gate_up: Tensor, down: Tensor) -> list[float]:
    experts = torch.cat([gate_up.flatten(1), down.flatten(1)], 1).float()
    return cosine_similarity(experts, experts.mean(0, keepdim=True)).tolist()
