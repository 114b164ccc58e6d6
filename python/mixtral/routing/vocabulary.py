"""Whether experts belong to tokens: the vocabulary specialisation of OLMoE (arXiv 2409.02060, eq. 8)."""

import numpy as np

from .statistics import ratio
from .tokens import Tokens

OCCURRENCES = 10
PERMUTATIONS = 4  # of the null, which is a mean over all tokens
TOP_TOKENS = 8


class Vocabulary:
    """For token ids as read (input), as the model predicts them (predicted), and as they follow (true)."""

    def __init__(self, tokens: Tokens, seed: int = 0) -> None:
        self._tokens = tokens
        before, after = tokens.pairs()
        predicted = np.flatnonzero(tokens.predicted_id >= 0)
        self._labels = {
            "input": (np.arange(len(tokens)), tokens.token_id),
            "predicted": (predicted, tokens.predicted_id[predicted]),
            "true": (before, tokens.token_id[after]),
        }
        self._ids, self._of = {}, {}
        rng = np.random.default_rng(seed)
        self._orders = [rng.permutation(len(tokens)) for _ in range(PERMUTATIONS)]
        for name, (rows, ids) in self._labels.items():
            self._ids[name], index, counts = np.unique(ids, return_inverse=True, return_counts=True)
            self._of[name] = (rows, index, counts)

    def measure(self, layer: int) -> dict:
        """{label: specialisation, its null, both shrunk to one number}, top tokens of each expert, and overlap.

        ``specialisation`` is the mean over tokens, of ids with ten occurrences, of the largest share of an expert among
        the occurrences of their id; ``null`` is the same after a permutation: the largest of noisy shares is above the
        mean. ``shrunk`` is (specialisation − null) / (1 − null).
        """
        experts = self._tokens.experts(layer)
        result = {}
        for name in self._labels:
            value = self._specialisation(name, experts)
            null = float(np.mean([self._specialisation(name, experts[order]) for order in self._orders]))
            shrunk = float(ratio(value - null, 1 - null))
            result[name] = {"specialisation": value, "null": null, "shrunk": shrunk}
        return result | {"overlap": self._overlap(experts), "top_tokens": self._top_tokens(experts)}

    def _counts(self, name: str, experts: np.ndarray) -> np.ndarray:
        """How often each id went to each expert, [V, E]."""
        rows, index, counts = self._of[name]
        keys = index[:, None] * self._tokens.num_experts + experts[rows]
        table = np.bincount(keys.ravel(), minlength=len(counts) * self._tokens.num_experts)
        return table.reshape(len(counts), -1)

    def _specialisation(self, name: str, experts: np.ndarray) -> float:
        counts = self._of[name][2]
        often = counts >= OCCURRENCES
        return float(ratio(self._counts(name, experts)[often].max(1).sum(), counts[often].sum()))

    def _overlap(self, experts: np.ndarray) -> dict:
        """Share of experts that two occurrences of the same id have in common; null: any two tokens."""
        counts = self._counts("input", experts).astype(float)
        of_id, top_k = self._of["input"][2].astype(float), self._tokens.top_k
        pairs = (of_id * (of_id - 1)).sum()
        used = counts.sum(0) / len(experts)
        return {
            "same_token": float(ratio((counts * (counts - 1)).sum(), pairs * top_k)),
            "null": float(used @ used / top_k),
        }

    def _top_tokens(self, experts: np.ndarray) -> list[list[dict]]:
        """The ids with the largest share of each expert, ten occurrences at least: [E] lists."""
        often = np.flatnonzero(self._of["input"][2] >= OCCURRENCES)
        share = self._counts("input", experts)[often] / self._of["input"][2][often, None]
        best = np.argsort(-share, axis=0, kind="stable")[:TOP_TOKENS]
        ids = self._ids["input"][often]
        return [
            [{"token_id": int(ids[i]), "share": float(share[i, e])} for i in best[:, e] if share[i, e] > 0]
            for e in range(share.shape[1])
        ]
