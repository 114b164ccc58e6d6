"""How evenly the experts are used: Figs. 7 and 9 of the Mixtral paper, and the measures of balance."""

import numpy as np
from scipy import stats

from .statistics import entropy_bits, ratio
from .tokens import Tokens

DEAD = 0.01  # an expert with less than this share of its even part


def balance(counts: np.ndarray) -> dict:
    """Measures of balance of assignments, counts [E].

    ``entropy`` is H / log E, ``jain`` 1 / (E Σ p²), ``max_violation`` the largest load over the mean, less 1 (loss-free
    balancing, arXiv 2408.15664), ``effective_experts`` e^H.
    """
    num_experts, share = len(counts), counts / counts.sum()
    bits = float(entropy_bits(counts))
    rising = np.sort(share)
    return {
        "entropy": bits / np.log2(num_experts) if num_experts > 1 else 1.0,
        "jain": float(1 / (num_experts * (share @ share))),
        "max_violation": float(num_experts * share.max() - 1),
        "gini": float(1 - 2 * (rising.cumsum().sum() - 0.5) / num_experts),
        "variation": float(stats.variation(share)),
        "effective_experts": 2**bits,
        "dead": int((share < DEAD / num_experts).sum()),
    }


def shares(first: np.ndarray | None, second: np.ndarray | None, either: np.ndarray) -> dict:
    """Shares of each expert among first, second and all choices, counts [E]; None where they are not known."""
    known = {"first": first, "second": second, "either": either}
    return {name: None if n is None else (n / n.sum()).tolist() for name, n in known.items()}


def expert_load(tokens: Tokens, layer: int) -> dict:
    """{domain: shares, measures of balance, and half the width of the shares' 99 % intervals}."""
    units, num_experts = tokens.units, tokens.num_experts
    unit = units.of_token[:, None] * num_experts + tokens.experts(layer)
    counts = np.stack(
        [
            np.bincount(unit[:, k], minlength=len(units.domain) * num_experts).reshape(-1, num_experts)
            for k in range(tokens.top_k)
        ]
    )  # [K, U, E]
    result = {}
    for d, name in enumerate(tokens.names):
        mine = counts[:, units.domain == d].sum(1)
        result[name] = shares(mine[0], mine[1] if tokens.top_k > 1 else None, mine.sum(0)) | balance(mine.sum(0))
        result[name]["half_width"] = {
            "first": units.half_width(counts[0], counts[0].sum(-1, keepdims=True), d).tolist(),
            "either": units.half_width(counts.sum(0), counts.sum((0, 2))[:, None], d).tolist(),
        }
    return result


def multinomial_half_width(counts: np.ndarray) -> list[float]:
    """Of shares when tokens are independent, which is all that bare counts [E] can say."""
    share = counts / counts.sum()
    return (stats.norm.ppf(0.995) * np.sqrt(ratio(share * (1 - share), counts.sum()))).tolist()
