"""Whether neighbouring tokens go to the same experts: Table 5 and Fig. 10 of the Mixtral paper.

The paper compares with experts that are all equally likely. They are not, and unequal loads alone let neighbours agree
more often; so the null here has the measured loads: Σ p² for the first choice, and for the whole set the chance that
two sets, drawn at random from those of the domain, have an expert in common.
"""

from math import comb

import numpy as np

from .statistics import interval, ratio
from .tokens import Tokens

LAGS = (1, 2, 4, 8, 16, 32, 64)
DRAWS = 1_000_000  # of the null of sets of three or more


def uniform_null(num_experts: int, top_k: int) -> tuple[float, float]:
    """The paper's baselines: 12.5 % and 46.4 % for two of eight experts."""
    return 1 / num_experts, 1 - comb(num_experts - top_k, top_k) / comb(num_experts, top_k)


def agreement(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whether first choices are the same, sets meet, and sets are the same; bool [n] of int [n, K] twice."""
    shared = sum((a[:, i] == b[:, j]).astype(np.int8) for i in range(a.shape[1]) for j in range(b.shape[1]))
    return a[:, 0] == b[:, 0], shared > 0, shared == a.shape[1]


def load_null(experts: np.ndarray, num_experts: int) -> tuple[float, float, float]:
    """The same three for independent tokens with the loads of ``experts`` [n, K], in expectation."""
    n, top_k = experts.shape
    first = np.bincount(experts[:, 0], minlength=num_experts) / n
    if top_k > 2:
        rng = np.random.default_rng(0)
        _, meet, same = agreement(*(experts[rng.integers(n, size=DRAWS)] for _ in range(2)))
        return float(first @ first), float(meet.mean()), float(same.mean())
    ordered = np.sort(experts, axis=1)
    sets = np.bincount(ordered[:, 0] * num_experts + ordered[:, -1]) / n
    used = np.bincount(experts.ravel(), minlength=num_experts) / n
    same = float(sets @ sets)
    # E|S ∩ S'| is Σ used²; sets that are the same count twice in it.
    meet = float(used @ used) - (same if top_k == 2 else 0)
    return float(first @ first), meet, same


def locality(tokens: Tokens, layer: int) -> dict:
    """{domain: shares of pairs of tokens, at lag 1 and further on, with nulls and half widths}."""
    experts, units = tokens.experts(layer), tokens.units
    near, far = tokens.pairs()
    agreed = agreement(experts[near], experts[far])
    other = tokens.token[near] != tokens.token[far]
    pairs = units.sums(np.ones(len(near)), near)
    sums = np.stack([units.sums(flag, near) for flag in agreed], 1)  # [U, 3]
    other_sums = np.stack([units.sums(flag & other, near) for flag in agreed], 1)
    other_pairs = units.sums(other, near)
    lags = {lag: _by_domain(tokens, experts, lag) for lag in LAGS}
    uniform = uniform_null(tokens.num_experts, tokens.top_k)

    result = {}
    for d, name in enumerate(tokens.names):
        mine = units.domain == d
        value = ratio(sums[mine].sum(0), pairs[mine].sum())
        half = units.half_width(sums, pairs[:, None], d)
        null = load_null(experts[tokens.domain == d], tokens.num_experts)
        different = ratio(other_sums[mine].sum(0), other_pairs[mine].sum())
        result[name] = {
            "first": value[0],
            "either": value[1],
            "null_first": null[0],
            "null_either": null[1],
            "uniform_first": uniform[0],
            "uniform_either": uniform[1],
            "same_set": value[2],
            "null_same_set": null[2],
            "different_token": {"first": different[0], "either": different[1]},
            "intervals": {"first": interval(value[0], half[0], 0, 1), "either": interval(value[1], half[1], 0, 1)},
            "lags": {str(lag): {"first": both[d, 0], "either": both[d, 1]} for lag, both in lags.items()},
        }
    return result


def _by_domain(tokens: Tokens, experts: np.ndarray, lag: int) -> np.ndarray:
    """Agreement of first choices and of sets at this lag, [domains, 2]."""
    near, far = tokens.pairs(lag)
    first, meet, _ = agreement(experts[near], experts[far])
    count = np.bincount(tokens.domain[near], minlength=len(tokens.names))
    both = [np.bincount(tokens.domain[near], flag, len(tokens.names)) for flag in (first, meet)]
    return ratio(np.stack(both, 1), count[:, None])
