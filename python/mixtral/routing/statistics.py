"""What several metrics share: entropies of counts, information with its correction, and intervals by documents.

Intervals are of 99 %. The unit that is drawn again is the document, because tokens of one document resemble each other.
"""

from collections.abc import Callable

import numpy as np
from scipy import stats

CONFIDENCE = 0.99
REPLICATES = 1000
LEAST_UNITS, MOST_UNITS = 20, 200  # a domain


def entropy_bits(counts: np.ndarray, axis: int = -1) -> np.ndarray:
    """Entropy in bits of the distribution that ``counts`` have along ``axis``; NaN where there are none."""
    with np.errstate(invalid="ignore"):
        return stats.entropy(counts, base=2, axis=axis)


def mutual_information_bits(table: np.ndarray) -> float:
    """I(row; column) in bits of a table of counts [A, B]: the Jensen-Shannon divergence of its weighted rows."""
    return float(entropy_bits(table.sum(0)) + entropy_bits(table.sum(1)) - entropy_bits(table.ravel()))


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Their quotient; NaN where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0)


class Units:
    """Tokens grouped for the bootstrap: whole documents of one domain, at most 200 groups a domain.

    A domain of fewer than 20 documents is cut into 20 runs of consecutive tokens instead.

    Attributes:
        of_token: int [N], the unit of each token.
        domain: int [U], the domain of each unit.
    """

    def __init__(self, doc: np.ndarray, domain: np.ndarray, num_domains: int, seed: int = 0) -> None:
        self.of_token = np.zeros(len(doc), np.int64)
        domains: list[int] = []
        for d in range(num_domains):
            rows = np.flatnonzero(domain == d)
            if len(rows) == 0:
                continue
            rank, most = np.unique(doc[rows], return_inverse=True)[1], MOST_UNITS
            if rank.max() + 1 < LEAST_UNITS:
                rank, most = np.arange(len(rows)), LEAST_UNITS
            count = int(rank.max()) + 1
            units = min(count, most)
            self.of_token[rows] = len(domains) + rank * units // count
            domains += [d] * units
        self.domain = np.array(domains)
        self._weights = {None: self._draw(np.random.default_rng(seed))}
        for d in range(num_domains):
            self._weights[d] = self._weights[None][:, self.domain == d]

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        """How often each unit is drawn in each replicate, [REPLICATES, U]; as many of every domain as there are."""
        weights = np.zeros((REPLICATES, len(self.domain)), np.float32)
        for d in np.unique(self.domain):
            mine = np.flatnonzero(self.domain == d)
            weights[:, mine] = rng.multinomial(len(mine), np.full(len(mine), 1 / len(mine)), REPLICATES)
        return weights

    def sums(self, values: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Sum of ``values`` [n] over each unit, [U]; ``rows``: the tokens that they belong to."""
        unit = self.of_token if rows is None else self.of_token[rows]
        return np.bincount(unit, values, len(self.domain))

    def half_width(self, numerator: np.ndarray, denominator: np.ndarray, domain: int | None = None) -> np.ndarray:
        """Half the width of the interval of Σ numerator / Σ denominator, from sums by unit [U] or [U, M]; [] or [M].

        The bootstrap's standard deviation, times Student's t for the number of units.
        """
        weights = self._weights[domain]
        mine = slice(None) if domain is None else self.domain == domain
        if weights.shape[1] < 2 or not denominator[mine].any():
            return np.full(numerator.shape[1:], np.nan)
        drawn = ratio(weights @ numerator[mine], weights @ denominator[mine])
        return np.nanstd(drawn, axis=0) * stats.t.ppf((1 + CONFIDENCE) / 2, weights.shape[1] - 1)

    def percentiles(self, statistic: Callable, *samples: np.ndarray) -> tuple[float, float]:
        """The interval of a statistic of sums [..., E] of several domains, from their sums by unit, each [u, E]."""
        rng = np.random.default_rng(0)
        drawn = [rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), REPLICATES) @ rows for rows in samples]
        low, high = np.nanquantile(statistic(*drawn), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return float(low), float(high)


def interval(value: float, half: float, least: float = -np.inf, most: float = np.inf, **more: float) -> dict:
    """{"value", "low", "high"} and ``more``; the interval stays between ``least`` and ``most``."""
    low, high = max(value - half, min(least, value)), min(value + half, max(most, value))
    return {"value": float(value), "low": float(low), "high": float(high), **more}


class Logs:
    """log2 n and n·log2 n of the integers 0 to ``most``, for tables of counts; 0 for 0."""

    def __init__(self, most: int) -> None:
        numbers = np.arange(most + 1)
        self.log = np.log2(np.maximum(numbers, 1))
        self.times = numbers * self.log


def possible_cells(counts: np.ndarray) -> float:
    """How many cells of a table occur at all, seen or not: Chao's estimate (1984) from those seen once and twice."""
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    return np.count_nonzero(counts) + once * (once - 1) / (2 * (twice + 1))
