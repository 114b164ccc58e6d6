"""The tokens of a trace that are analysed, and what all metrics derive from them."""

import numpy as np

from .statistics import Units
from .trace import Trace

LEAST_TOKENS = 20  # of a domain: fewer say nothing


class Tokens:
    """The N tokens of a trace that are not special, with their documents.

    Attributes:
        trace: these tokens alone.
        units: what the bootstrap draws.
        vocabulary: int [V], the token ids that occur, rising.
        token: int64 [N], each token's index in ``vocabulary``.
        domain: int64 [N].
        names: of the domains.
    """

    def __init__(self, trace: Trace) -> None:
        """
        Raises:
            ValueError: a domain of fewer than 20 tokens.
        """
        self.trace = trace.rows(trace.special == 0)
        self.names = trace.domains
        self.domain = self.trace.domain.astype(np.int64)
        sizes = np.bincount(self.domain, minlength=len(self.names))
        for name, size in zip(self.names, sizes, strict=True):
            if size < LEAST_TOKENS:
                raise ValueError(f"domain {name}: expected at least {LEAST_TOKENS} tokens, got {size}")
        self.num_experts, self.top_k = trace.num_experts, trace.top_k
        self.units = Units(self.trace.doc, self.domain, len(self.names))
        self.vocabulary, self.token = np.unique(self.trace.token_id, return_inverse=True)

    def __len__(self) -> int:
        return len(self.trace)

    def experts(self, layer: int) -> np.ndarray:
        """int64 [N, K] of the layer with this index."""
        return self.trace.topk_ids[:, layer].astype(np.int64)

    def pairs(self, lag: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Rows (i, i + lag) that are ``lag`` apart in one document."""
        doc, position = self.trace.doc, self.trace.position
        first = np.flatnonzero((doc[lag:] == doc[:-lag]) & (position[lag:] - position[:-lag] == lag))
        return first, first + lag

    def members(self, experts: np.ndarray) -> np.ndarray:
        """Whether each token chose each expert: bool [N, E] of int [N, K]."""
        chosen = np.zeros((len(experts), self.num_experts), bool)
        np.put_along_axis(chosen, experts, True, axis=1)
        return chosen

    def thinned(self, most: int) -> np.ndarray:
        """At most ``most`` rows: a run of consecutive tokens of each domain, as long as the others' where there are."""
        share = max(most // len(self.names), 1)
        runs = [np.flatnonzero(self.domain == d)[:share] for d in range(len(self.names))]
        return np.concatenate(runs)
