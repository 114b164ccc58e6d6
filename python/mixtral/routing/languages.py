"""Whether languages have experts of their own, on parallel text: the same content, so that topics differ in nothing."""

from itertools import combinations

import numpy as np

from .statistics import entropy_bits, ratio
from .tokens import Tokens


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence of counts [..., E], as a part of the most that their entropies allow, in [0, 1].

    The most is log E − (H(p) + H(q)) / 2: loads that are even cannot differ much, and this makes them comparable.
    """
    p, q = (x / np.maximum(x.sum(-1, keepdims=True), 1) for x in (p, q))
    mean = (entropy_bits(p) + entropy_bits(q)) / 2
    return ratio(entropy_bits((p + q) / 2) - mean, np.log2(p.shape[-1]) - mean)


def languages(tokens: Tokens, layer: int) -> dict:
    """``experts[language]``: shares [E] of assignments. ``divergence["a-b"]`` with its interval and null.

    The null is the larger divergence between two halves of one of the two languages, odd and even units.
    """
    units, num_experts = tokens.units, tokens.num_experts
    keys = units.of_token[:, None] * num_experts + tokens.experts(layer)
    counts = np.bincount(keys.ravel(), minlength=len(units.domain) * num_experts).reshape(-1, num_experts)
    mine = {name: counts[units.domain == d] for d, name in enumerate(tokens.names)}
    halves = {name: float(divergence(rows[::2].sum(0), rows[1::2].sum(0))) for name, rows in mine.items()}
    pairs = {}
    for a, b in combinations(tokens.names, 2):
        low, high = units.percentiles(divergence, mine[a], mine[b])
        value = float(divergence(mine[a].sum(0), mine[b].sum(0)))
        pairs[f"{a}-{b}"] = {
            "value": value,
            "low": min(low, value),
            "high": max(high, value),
            "null": max(halves[a], halves[b]),
        }
    shares = {name: (rows.sum(0) / rows.sum()).tolist() for name, rows in mine.items()}
    return {"experts": shares, "divergence": pairs}
