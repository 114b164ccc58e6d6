"""The tokens of a trace that are analysed, and what all metrics derive from them."""

from typing import TYPE_CHECKING

import numpy as np

from .statistics import Units

if TYPE_CHECKING:
    from ..trace import Trace

LEAST_TOKENS = 20  # of a domain: fewer say nothing


class Tokens:
    """N tokens of a trace, without the special ones, in arrays of NumPy.

    Attributes:
        names: of the D domains.
        domain: int64 [N], an index of ``names``.
        kept: bool, which rows of the trace these are.
        token_id, predicted_id, position: int32 [N].
        vocabulary, token: int [V], the ids that occur, rising; int64 [N], each token's index among them.
        topk_ids: uint8 [N, L, K].
        layers: the number in the model of each of the L layers.
        units: what the bootstrap draws.
    """

    def __init__(self, trace: "Trace", names: list[str] | None = None, layers: list[int] | None = None) -> None:
        """
        Args:
            names: the domains that are analysed; None: all.
            layers: the same of layers.

        Raises:
            ValueError: a layer that the trace does not have, or a domain of fewer than 20 tokens.
        """
        self.names = trace.domain_names if names is None else names
        self.num_experts, self.top_k = trace.num_experts, trace.topk_ids.shape[2]
        self.layers = checked_layers(layers, trace.topk_ids.shape[1])
        at = np.array([self.names.index(n) if n in self.names else -1 for n in trace.domain_names], np.int64)
        domain = at[np.asarray(trace.domains)]
        keep = ~np.asarray(trace.special).astype(bool) & (domain >= 0)

        self.kept, self.domain = keep, domain[keep]
        self._check_sizes()
        self.token_id, self.predicted_id, self.position = (
            np.asarray(tensor)[keep] for tensor in (trace.token_ids, trace.predicted_ids, trace.positions)
        )
        self.topk_ids = np.asarray(trace.topk_ids)[keep][:, self.layers]
        self._all_ids, self._logits, self._next_gate = trace.topk_ids, trace.router_logits, trace.next_gate_ids
        self.vocabulary, self.token = np.unique(self.token_id, return_inverse=True)
        doc = np.asarray(trace.docs)[keep]
        new = (np.diff(doc, prepend=-1) != 0) | (np.diff(self.position, prepend=0) < 0)
        self._sequence = np.cumsum(new)
        self.units = Units(self._sequence, self.domain, len(self.names))

    def __len__(self) -> int:
        return len(self.token_id)

    def experts(self, layer: int) -> np.ndarray:
        """int64 [N, K] of the analysed layer with this index."""
        return self.topk_ids[:, layer].astype(np.int64)

    def router_logits(self, layer: int) -> np.ndarray | None:
        """float32 [N, E] of this layer; None where the trace has none."""
        if self._logits is None:
            return None
        return np.asarray(self._logits)[self.kept, self.layers[layer]].astype(np.float32)

    def next_gate(self, layer: int) -> tuple[np.ndarray, np.ndarray] | None:
        """int64 [N, K] of the model's next layer: its choices from this layer's input, and its own.

        None where the trace has none, and for the last layer.
        """
        number = self.layers[layer]
        if self._next_gate is None or number + 1 == self._all_ids.shape[1]:
            return None
        guess, own = np.asarray(self._next_gate)[:, number], np.asarray(self._all_ids)[:, number + 1]
        return guess[self.kept].astype(np.int64), own[self.kept].astype(np.int64)

    def pairs(self, lag: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Rows (i, i + lag) that are ``lag`` apart in one sequence."""
        first = np.flatnonzero(self.are_pairs(lag))
        return first, first + lag

    def are_pairs(self, lag: int) -> np.ndarray:
        """Whether rows i and i + lag are ``lag`` apart in one sequence, bool [N - lag]."""
        same = self._sequence[lag:] == self._sequence[:-lag]
        return same & (self.position[lag:] - self.position[:-lag] == lag)

    def members(self, experts: np.ndarray) -> np.ndarray:
        """Whether each token chose each expert: bool [N, E] of int [N, K]."""
        chosen = np.zeros((len(experts), self.num_experts), bool)
        np.put_along_axis(chosen, experts, True, axis=1)
        return chosen

    def first_rows(self, most: int) -> np.ndarray:
        """At most ``most`` rows: the first ones of each domain, as many of each."""
        share = max(most // len(self.names), 1)
        return np.concatenate([np.flatnonzero(self.domain == d)[:share] for d in range(len(self.names))])

    def _check_sizes(self) -> None:
        for name, size in zip(self.names, np.bincount(self.domain, minlength=len(self.names)), strict=True):
            check_size(name, size)


def check_size(domain: str, tokens: int, least: int = LEAST_TOKENS) -> None:
    """
    Raises:
        ValueError: the domain has fewer tokens.
    """
    if tokens < least:
        raise ValueError(f"domain {domain}: expected at least {least} tokens, got {tokens}")


def checked_layers(layers: list[int] | None, num_layers: int) -> list[int]:
    """All layers for None.

    Raises:
        ValueError: a layer that the model does not have.
    """
    for layer in layers or []:
        if not 0 <= layer < num_layers:
            raise ValueError(f"--layers: expected layers in [0, {num_layers - 1}], got {layer}")
    return list(range(num_layers)) if layers is None else layers
