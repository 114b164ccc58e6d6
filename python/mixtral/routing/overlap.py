"""How many experts two choices for the same tokens share."""

import numpy as np

from .statistics import interval
from .tokens import Tokens


def overlap(tokens: Tokens, mine: np.ndarray, theirs: np.ndarray) -> dict:
    """Mean |S ∩ S'| / K over tokens, with its interval; mine, theirs: int [N, K].

    ``null`` is what independent choices with both loads have, Σ m m' / K.
    """
    both = tokens.members(mine), tokens.members(theirs)
    shared = (both[0] & both[1]).sum(1) / tokens.top_k
    half = tokens.units.half_width(tokens.units.sums(shared), tokens.units.sums(np.ones(len(shared))))
    null = float(both[0].mean(0) @ both[1].mean(0)) / tokens.top_k
    return interval(shared.mean(), float(half), 0, 1) | {"null": null}
