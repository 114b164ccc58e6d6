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
    """Whether first choices are the same, sets meet, and sets are the same; bool [n] of [n, K] twice."""
    shared = sum((a[:, i] == b[:, j]).astype(np.int8) for i in range(a.shape[1]) for j in range(b.shape[1]))
    return a[:, 0] == b[:, 0], shared > 0, shared == a.shape[1]


def load_null(experts: np.ndarray, num_experts: int) -> tuple[float, float, float]:
    """The same three for independent tokens with the loads of ``experts`` [n, K], in expectation."""
    n, top_k = experts.shape
    first = np.bincount(experts[:, 0], minlength=num_experts) / n
    if top_k > 2:
        rng = np.random.default_rng(0)
        choices = experts.T.astype(np.uint8)  # a row is one choice of all tokens: fast to compare
        _, meet, same = agreement(*(choices[:, rng.integers(n, size=DRAWS)].T for _ in range(2)))
        return float(first @ first), float(meet.mean()), float(same.mean())
    ordered = np.sort(experts, axis=1)
    sets = np.bincount(ordered[:, 0] * num_experts + ordered[:, -1]) / n
    used = np.bincount(experts.ravel(), minlength=num_experts) / n
    same = float(sets @ sets)
    # E|S ∩ S'| is Σ used²; sets that are the same count twice in it.
    meet = float(used @ used) - (same if top_k == 2 else 0)
    return float(first @ first), meet, same


class Locality:
    """The pairs of each lag, found once for all layers."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._pairs = {lag: tokens.are_pairs(lag) for lag in LAGS}  # bool [N - lag]
        self._count = {lag: self._sums(are_pairs, lag) for lag, are_pairs in self._pairs.items()}
        self._different = self._pairs[1] & (tokens.token[1:] != tokens.token[:-1])

    def _sums(self, flag: np.ndarray, lag: int = 1) -> np.ndarray:
        """How many tokens of each unit have ``flag`` [N - lag] set, [U]."""
        return np.bincount(self._tokens.units.of_token[:-lag][flag], minlength=len(self._tokens.units.domain))

    def measure(self, layer: int) -> dict:
        """{domain: shares of pairs of tokens, at lag 1 and further on, with nulls and intervals}."""
        tokens, units = self._tokens, self._tokens.units
        experts = tokens.topk_ids[:, layer].T.copy().T  # a choice of all tokens lies together
        agreed = {lag: agreement(experts[:-lag], experts[lag:]) for lag in LAGS}
        sums = {
            lag: np.stack([self._sums(flag & self._pairs[lag], lag) for flag in flags], 1)
            for lag, flags in agreed.items()
        }  # [U, 3]
        different = np.stack([self._sums(flag & self._different) for flag in agreed[1]], 1)
        different_pairs = self._sums(self._different)
        uniform = uniform_null(tokens.num_experts, tokens.top_k)

        result = {}
        for d, name in enumerate(tokens.names):
            mine = units.domain == d
            value = ratio(sums[1][mine].sum(0), self._count[1][mine].sum())
            half = units.half_width(sums[1], self._count[1][:, None], d)
            null = load_null(tokens.experts(layer)[tokens.domain == d], tokens.num_experts)
            other = ratio(different[mine].sum(0), different_pairs[mine].sum())
            lags = {lag: ratio(sums[lag][mine].sum(0), self._count[lag][mine].sum()) for lag in LAGS}
            result[name] = {
                "first": value[0],
                "either": value[1],
                "null_first": null[0],
                "null_either": null[1],
                "uniform_first": uniform[0],
                "uniform_either": uniform[1],
                "same_set": value[2],
                "null_same_set": null[2],
                "different_token": {"first": other[0], "either": other[1]},
                "intervals": {"first": interval(value[0], half[0], 0, 1), "either": interval(value[1], half[1], 0, 1)},
                "lags": {str(lag): {"first": both[0], "either": both[1]} for lag, both in lags.items()},
            }
        return result
