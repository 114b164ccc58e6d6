"""Which experts are chosen together, over what their loads make of it."""

from itertools import combinations

import numpy as np

from .statistics import ratio
from .tokens import Tokens

STEPS = 200  # of the fit, at most


def quasi_independent(pairs: np.ndarray) -> np.ndarray:
    """Expected pairs [E, E] when sets are drawn by load alone: w_i w_j off the diagonal, the row sums of ``pairs``.

    This is quasi-independence, the model of a table whose diagonal cannot occur, fitted in turns (Goodman 1968).
    """
    rows = pairs.sum(1)
    weights = np.sqrt(rows / max(rows.sum(), 1) ** 0.5)
    for _ in range(STEPS):
        others = weights.sum() - weights
        fitted = np.sqrt(weights * ratio(rows, others))  # the square root keeps the turns from going round
        fitted = np.nan_to_num(fitted)
        if np.allclose(fitted, weights, rtol=1e-9):
            break
        weights = fitted
    expected = np.outer(weights, weights)
    np.fill_diagonal(expected, 0)
    return expected


def coactivation(tokens: Tokens, layer: int) -> dict:
    """``share[i][j]``: the part of the tokens of expert i that expert j has too; ``lift``: over quasi-independence.

    All pairs of a token's K experts count. ``lift`` is NaN where none are expected.
    """
    num_experts, experts = tokens.num_experts, tokens.experts(layer)
    once = np.zeros((num_experts, num_experts))
    for i, j in combinations(range(tokens.top_k), 2):
        keys = experts[:, i] * num_experts + experts[:, j]
        once += np.bincount(keys, minlength=num_experts**2).reshape(num_experts, -1)
    pairs, of_expert = once + once.T, np.bincount(experts.ravel(), minlength=num_experts)
    lift = ratio(pairs, quasi_independent(pairs))
    return {"share": ratio(pairs, of_expert[:, None]).tolist(), "lift": lift.tolist()}
