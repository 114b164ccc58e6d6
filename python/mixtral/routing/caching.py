"""What a cache of experts would save when the others have to be fetched: hit rates over its capacity."""

import numpy as np

from .statistics import ratio
from .tokens import Tokens

TOKENS = 4096  # replayed, in equal runs of the domains
MOST_TIMES = 16_000_000  # of next uses that are kept: fewer tokens for many experts
SEGMENT = 16


class Caching:
    """Replays a run of tokens against caches of 1 to E experts, all layers side by side.

    A token asks for its K experts one after the other, the most probable first. An expert that is not there takes the
    place of another one: the one not used for longest (``lru``), the one used least so far (``lfu``), or the one whose
    next use is farthest (``belady``), which no cache can beat. Null: the share c / E of a random cache.
    """

    def __init__(self, tokens: Tokens) -> None:
        self._num_experts = tokens.num_experts
        times = tokens.top_k * len(tokens.layers) * tokens.num_experts  # a token
        rows = tokens.first_rows(min(TOKENS, MOST_TIMES // times))
        experts = tokens.topk_ids[rows].astype(np.int64)  # [n, L, K]
        self._experts = experts
        self._asked = np.swapaxes(experts, 1, 2).reshape(-1, experts.shape[1])  # [T, L]
        self._belady = belady(self._asked, self._num_experts)

    def measure(self, layer: int) -> dict:
        asked = self._asked[:, layer]
        return {
            "capacity": list(range(1, self._num_experts + 1)),
            "lru": _rates(_recency(asked, self._num_experts), self._num_experts),
            "lfu": _rates(_frequency(asked, self._num_experts), self._num_experts),
            "belady": self._belady[:, layer].tolist(),
            "null": ((np.arange(self._num_experts) + 1) / self._num_experts).tolist(),
            "segment": self._segments(self._experts[:, layer]),
        }

    def _segments(self, experts: np.ndarray) -> dict:
        """How much of 16 consecutive tokens the best c experts of that run serve (SRP, arXiv 2505.16056).

        Null: the same tokens in random order.
        """
        mixed = np.random.default_rng(0).permutation(experts)
        return {"value": self._covered(experts), "null": self._covered(mixed)}

    def _covered(self, experts: np.ndarray) -> list[float]:
        runs = max(len(experts) // SEGMENT, 1)
        run = np.minimum(np.arange(len(experts)) // SEGMENT, runs - 1)
        keys = run[:, None] * self._num_experts + experts
        counts = np.bincount(keys.ravel(), minlength=runs * self._num_experts).reshape(runs, -1)
        return (np.cumsum(-np.sort(-counts, axis=1), axis=1).sum(0) / counts.sum()).tolist()


def _rates(place: np.ndarray, num_experts: int) -> list[float]:
    """Hit rates of caches of 1 to E, from the place [T] that the asked expert has in the order of eviction."""
    return (np.cumsum(np.bincount(place, minlength=num_experts + 1)[:num_experts]) / len(place)).tolist()


def _recency(asked: np.ndarray, num_experts: int) -> np.ndarray:
    """How many experts were asked for since the last time that this one was, [T]; E: never before."""
    steps = np.arange(len(asked))
    last = np.where(asked[:, None] == np.arange(num_experts), steps[:, None], -1)
    last = np.vstack([np.full(num_experts, -1), np.maximum.accumulate(last, axis=0)[:-1]])  # before each step
    own = last[steps, asked]
    return np.where(own < 0, num_experts, (last > own[:, None]).sum(1))


def _frequency(asked: np.ndarray, num_experts: int) -> np.ndarray:
    """How many experts were asked for more often before, [T]; of equals, those with smaller ids. E: never before."""
    steps = np.arange(len(asked))
    used = np.cumsum(asked[:, None] == np.arange(num_experts), axis=0)
    used = np.vstack([np.zeros(num_experts, np.int64), used[:-1]])
    own = used[steps, asked][:, None]
    before = (used > own) | ((used == own) & (np.arange(num_experts) < asked[:, None]))
    return np.where(own[:, 0] == 0, num_experts, before.sum(1))


def belady(asked: np.ndarray, num_experts: int) -> np.ndarray:
    """Hit rates [E capacities, L] of the best possible replacement (Belady 1966), for L requests side by side [T, L].

    The cache may leave out what it has just fetched, when its next use is the farthest of all.
    """
    steps, layers = asked.shape
    capacity = np.arange(1, num_experts + 1)[:, None, None]
    held = np.zeros((num_experts, layers, num_experts), bool)  # [capacity, layer, expert]
    upcoming = _next_uses(asked, num_experts)
    hits = np.zeros((num_experts, layers))
    layer = np.arange(layers)
    for step in range(steps):
        expert = asked[step]
        hits += held[:, layer, expert]
        held[:, layer, expert] = True
        full = held.sum(2, keepdims=True) > capacity
        farthest = np.where(held, upcoming[step], -1).argmax(2)[..., None]
        evicted = full & (np.arange(num_experts) == farthest)
        held &= ~evicted
    return ratio(hits, steps)


def _next_uses(asked: np.ndarray, num_experts: int) -> np.ndarray:
    """When each expert is asked for next after each step, int [T, L, E]; past the end for never."""
    steps = len(asked)
    used = asked[..., None] == np.arange(num_experts)
    at = np.where(used, np.arange(steps)[:, None, None], steps + np.arange(num_experts)).astype(np.int32)
    later = np.minimum.accumulate(at[::-1], axis=0)[::-1]  # at this step or after it
    never = np.broadcast_to(steps + np.arange(num_experts), later[:1].shape)
    return np.concatenate([later[1:], never]).astype(np.int32)
