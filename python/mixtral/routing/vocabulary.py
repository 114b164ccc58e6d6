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
        predicted = np.flatnonzero(tokens.predicted_id >= 0)
        labels = {
            "input": (np.arange(len(tokens)), tokens.token_id),
            "predicted": (predicted, tokens.predicted_id[predicted]),
            "true": (before, tokens.token_id[after]),
        }
        rng = np.random.default_rng(seed)
        self._labels = {name: _Labels(rows, ids, rng) for name, (rows, ids) in labels.items()}

    def measure(self, layer: int) -> dict:
        """{label: specialisation, its null, both shrunk to one number}, top tokens of each expert, and overlap.

        ``specialisation`` is the mean over tokens, of ids with ten occurrences, of the largest share of an expert among
        the occurrences of their id; ``null`` is the same after a permutation: the largest of noisy shares is above the
        mean. ``shrunk`` is (specialisation − null) / (1 − null).
        """
        experts = self._tokens.experts(layer)
        result = {}
        for name, labels in self._labels.items():
            chosen = experts[labels.rows]
            value = self._specialisation(labels, labels.index, chosen)
            null = float(np.mean([self._specialisation(labels, index, chosen) for index in labels.permuted]))
            shrunk = float(ratio(value - null, 1 - null))
            result[name] = {"specialisation": value, "null": null, "shrunk": shrunk}
        counts = self._counts(self._labels["input"], self._labels["input"].index, experts)
        return result | {"overlap": self._overlap(counts), "top_tokens": self._top_tokens(counts)}

    def _counts(self, labels: "_Labels", index: np.ndarray, experts: np.ndarray) -> np.ndarray:
        """How often each id went to each expert, [V, E]."""
        num_experts = self._tokens.num_experts
        keys = (index * num_experts)[:, None] + experts
        table = np.bincount(keys.ravel(), minlength=len(labels.ids) * num_experts)
        return table.reshape(-1, num_experts)

    def _specialisation(self, labels: "_Labels", index: np.ndarray, experts: np.ndarray) -> float:
        often = labels.counts >= OCCURRENCES
        return float(ratio(self._counts(labels, index, experts)[often].max(1).sum(), labels.counts[often].sum()))

    def _overlap(self, counts: np.ndarray) -> dict:
        """Share of experts that two occurrences of the same id have in common; null: any two tokens."""
        counts, top_k = counts.astype(float), self._tokens.top_k
        of_id = self._labels["input"].counts.astype(float)
        used = counts.sum(0) / len(self._tokens)
        return {
            "same_token": float(ratio((counts * (counts - 1)).sum(), (of_id * (of_id - 1)).sum() * top_k)),
            "null": float(used @ used / top_k),
        }

    def _top_tokens(self, counts: np.ndarray) -> list[list[dict]]:
        """The ids with the largest share of each expert, ten occurrences at least: [E] lists."""
        labels = self._labels["input"]
        often = np.flatnonzero(labels.counts >= OCCURRENCES)
        share = counts[often] / labels.counts[often, None]
        best = np.argsort(-share, axis=0, kind="stable")[:TOP_TOKENS]
        ids = labels.ids[often]
        return [
            [{"token_id": int(ids[i]), "share": float(share[i, e])} for i in best[:, e] if share[i, e] > 0]
            for e in range(share.shape[1])
        ]


class _Labels:
    """Token ids of some rows.

    Attributes:
        rows: [n], of the tokens.
        ids, counts: int [V], the ids that occur, and how often.
        index: int64 [n], indices of ``ids``.
        permuted: the same in random orders.
    """

    def __init__(self, rows: np.ndarray, ids: np.ndarray, rng: np.random.Generator) -> None:
        self.rows = rows
        self.ids, self.index, self.counts = np.unique(ids, return_inverse=True, return_counts=True)
        self.permuted = [rng.permutation(self.index) for _ in range(PERMUTATIONS)]
