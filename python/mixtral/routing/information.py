"""What decides the expert: how many bits of it the token, the domain, the position and the previous expert tell.

Counts of few tokens show information where there is none: the more, the more cells their table has (Panzeri and Treves
1996). The mean over permuted labels, the null, says how much when every label can meet every expert. Where a label
allows some experts alone, less has to be subtracted: the null's share of cells that occur, beyond those that every
label needs.
"""

from copy import copy
from dataclasses import dataclass

import numpy as np

from .statistics import Logs, interval, possible_cells
from .tokens import Tokens

OCCURRENCES = 10  # of a token, for each value of what may decide besides it
# One permutation moves the null by its relative spread, sqrt(2 / degrees of freedom), so few are needed where labels
# are many and the text is long; 200 where that is cheap.
LEAST_PERMUTATIONS, MOST_PERMUTATIONS, WORK = 8, 200, 20_000_000


@dataclass
class Cause:
    """Labels of n tokens, and what is known besides them.

    Attributes:
        rows: [n], the tokens with a label.
        given: int64 [n], what is known; 0 where nothing is.
        num_given: how many values it has.
        label: int64 [n]; None: the first expert of the token before, which is another one in every layer.
        num_labels: how many values it has.
        orders: permutations [n] of labels, among tokens with the same ``given``.
    """

    rows: np.ndarray
    given: np.ndarray
    num_given: int
    label: np.ndarray | None
    num_labels: int
    orders: list[np.ndarray]

    def joint(self, label: np.ndarray) -> np.ndarray:
        """int64 [n]: given and label in one number."""
        return self.given * self.num_labels + label


class Causes:
    """The causes, made once for all layers. Permutations are drawn once too, and serve every layer.

    The variable e is one of the K experts of a token, drawn at random. So the most that anything can say of it is
    H(e) − log2 K.
    """

    def __init__(self, tokens: Tokens, seed: int = 0) -> None:
        self._tokens = tokens
        self._logs = Logs(len(tokens) * tokens.top_k)
        work = len(tokens) * len(tokens.layers)
        self.permutations = int(np.clip(WORK // work, LEAST_PERMUTATIONS, MOST_PERMUTATIONS))
        self._rng = np.random.default_rng(seed)
        rows = np.arange(len(tokens))
        _, after = tokens.pairs()
        # Buckets double in size.
        bucket = np.log2(tokens.position + 1.0).astype(np.int64)
        is_predicted = np.flatnonzero(tokens.predicted_id >= 0)
        predicted = np.unique(tokens.predicted_id, return_inverse=True)[1]
        token = tokens.token
        of_previous = self._frequent(token, tokens.num_experts)
        self._causes = {
            "token": self._cause(np.flatnonzero(self._frequent(token)), None, token),
            "domain": self._cause(rows, None, tokens.domain),
            "domain_given_token": self._cause(
                np.flatnonzero(self._frequent(token, len(tokens.names))), token, tokens.domain
            ),
            "previous_given_token": self._cause(after[of_previous[after]], token, None),
            "position": self._cause(rows, None, bucket),
            "predicted": self._cause(is_predicted[self._frequent(predicted)[is_predicted]], None, predicted),
        }

    def _frequent(self, label: np.ndarray, num_values: int = 1) -> np.ndarray:
        """Which labels [N] occur 10 times for each value of what else may decide.

        Less often, down to once, where that would leave less than half of the text.
        """
        occurrences = np.bincount(label)[label]
        enough = (OCCURRENCES * num_values, OCCURRENCES, 2)
        return next((often for least in enough if (often := occurrences >= least).mean() >= 0.5), occurrences >= 1)

    def _cause(self, rows: np.ndarray, given: np.ndarray | None, label: np.ndarray | None) -> Cause:
        if given is None:
            known, num_given = np.zeros(len(rows), np.int64), 1
            orders = [self._rng.permutation(len(rows)) for _ in range(self.permutations)]
        else:
            values, known = np.unique(given[rows], return_inverse=True)
            num_given = max(len(values), 1)
            in_order = np.argsort(known, kind="stable")
            orders = [_within(known, in_order, self._rng) for _ in range(self.permutations)]
        num_labels = self._tokens.num_experts if label is None else int(label.max(initial=0)) + 1
        return Cause(rows, known, num_given, None if label is None else label[rows], num_labels, orders)

    def information(self, layer: int) -> dict:
        """{cause: bits with their interval, the null of permuted labels, and the most that is possible}."""
        experts = self._tokens.experts(layer)
        result = {name: self._measure(cause, experts, experts[:, 0]) for name, cause in self._causes.items()}
        result["domain_first"] = self._measure(self._causes["domain"], experts[:, :1], experts[:, 0])
        return result

    def _measure(self, cause: Cause, experts: np.ndarray, first: np.ndarray) -> dict:
        """I(e; label | given) = H(e | given) − H(e | given, label)."""
        n, size = len(cause.rows), cause.num_given * cause.num_labels
        if n == 0:
            return dict.fromkeys(("value", "low", "high", "null", "ceiling"), np.nan) | {"covered": 0.0}
        label = first[cause.rows - 1] if cause.label is None else cause.label
        chosen, top_k = experts[cause.rows], experts.shape[1]
        known = _Table(self._logs, cause.given, cause.num_given, chosen, self._tokens.num_experts)
        both = _Table(self._logs, cause.joint(label), size, chosen, self._tokens.num_experts)
        permuted = [both.permuted(cause.joint(label[order])) for order in cause.orders]
        null = known.entropy - np.mean([table.entropy for table in permuted])
        least = both.occupied_rows * top_k  # cells
        free = np.mean([table.possible - least for table in permuted])
        noise = null * max(both.possible - least, 0) / free if free > 0 else 0.0
        spread = _Table(self._logs, cause.given, cause.num_given, label[:, None], cause.num_labels).entropy
        ceiling = max(min(known.entropy - np.log2(top_k), spread), 0.0)

        units = self._tokens.units
        sums = units.sums(both.log_probability() - known.log_probability(), cause.rows)
        half = units.half_width(sums, units.sums(np.ones(n), cause.rows))
        more = {"null": float(null), "ceiling": float(ceiling), "covered": n / len(experts)}
        return interval(known.entropy - both.entropy - noise, half) | more


class _Table:
    """How often each label met each expert: counts [labels, E] of labels [n] and experts [n, K].

    Attributes:
        entropy: H(e | label) in bits.
        possible: how many cells occur, seen or not.
        occupied_rows: how many labels occur.
    """

    def __init__(self, logs: Logs, label: np.ndarray, num_labels: int, experts: np.ndarray, num_experts: int) -> None:
        self._logs, self._experts, self._shape, self._label = logs, experts, (num_labels, num_experts), label
        self._set_cells(label)
        self._of_label = self._cells.reshape(self._shape).sum(1)
        self.occupied_rows = np.count_nonzero(self._of_label)
        self._of_labels = logs.times[self._of_label].sum()
        self._set_entropy()

    def _set_cells(self, label: np.ndarray) -> None:
        keys = (label * self._shape[1])[:, None] + self._experts
        self._cells = np.bincount(keys.ravel(), minlength=self._shape[0] * self._shape[1])
        self.possible = possible_cells(self._cells)

    def _set_entropy(self) -> None:
        self.entropy = float(self._of_labels - self._logs.times[self._cells].sum()) / self._experts.size

    def permuted(self, label: np.ndarray) -> "_Table":
        """The table after a permutation of the labels, which are then as frequent as before."""
        other = copy(self)
        other._set_cells(label)
        other._set_entropy()
        return other

    def log_probability(self) -> np.ndarray:
        """Mean over a token's experts of log2 p(e | label), [n]: what the token adds to −H(e | label)."""
        keys = (self._label * self._shape[1])[:, None] + self._experts
        return self._logs.log[self._cells[keys]].mean(1) - self._logs.log[self._of_label[self._label]]


def _within(groups: np.ndarray, in_order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A permutation that moves rows only inside their group; ``in_order``: the rows sorted by group."""
    order = np.empty(len(groups), np.int64)
    order[in_order] = np.argsort(groups + rng.random(len(groups)))
    return order
