"""Whether a layer tells the experts of the next one."""

import numpy as np

from .overlap import overlap
from .statistics import entropy_bits, mutual_information_bits, ratio
from .tokens import Tokens

PATHS = 10
ROWS = 200_000  # of the paths


def transition(tokens: Tokens, layer: int) -> dict:
    """From this analysed layer to the next, first choices.

    ``share[i][j]`` is P(e' = j | e = i). ``information`` is I(e; e') in bits, less ``null``, what independent layers
    show, (E − 1)² / (2 N ln 2). ``normalised`` is its part of the geometric mean of the two entropies.
    """
    num_experts = tokens.num_experts
    here, there = tokens.experts(layer)[:, 0], tokens.experts(layer + 1)[:, 0]
    table = np.bincount(here * num_experts + there, minlength=num_experts**2).reshape(num_experts, -1)
    null = (np.count_nonzero(table.sum(0)) - 1) * (np.count_nonzero(table.sum(1)) - 1) / (2 * len(tokens) * np.log(2))
    bits = mutual_information_bits(table) - null
    both = np.sqrt(entropy_bits(table.sum(0)) * entropy_bits(table.sum(1)))
    return {
        "share": ratio(table, table.sum(1, keepdims=True)).tolist(),
        "information": bits,
        "null": null,
        "normalised": float(ratio(bits, both)),
    }


def gate_recall(tokens: Tokens, layer: int) -> dict | None:
    """The share of the next layer's experts that its router finds in this layer's input (recall at K).

    The input of this layer's router goes through the router of the model's next layer, as a loader of experts would do
    it ahead of time (Eliseev and Mazur, "Fast Inference of Mixture-of-Experts Language Models with Offloading", 2023,
    section 3.2). None for the last layer, and where the trace has no ``next_gate_ids``.
    """
    found = tokens.next_gate(layer)
    return None if found is None else overlap(tokens, *found)


def paths(tokens: Tokens) -> list[dict]:
    """The ten most frequent ways of a token's first choices through all analysed layers.

    ``null`` is the share that the product of the layers' loads makes of such a path.
    """
    first = tokens.topk_ids[:ROWS, :, 0]
    found, counts = np.unique(first, axis=0, return_counts=True)
    loads = np.stack([np.bincount(layer, minlength=tokens.num_experts) for layer in first.T]) / len(first)
    best = np.argsort(-counts, kind="stable")[:PATHS]
    return [
        {
            "experts": found[i].tolist(),
            "share": counts[i] / len(first),
            "null": float(np.prod(loads[np.arange(len(loads)), found[i]])),
        }
        for i in best
    ]
