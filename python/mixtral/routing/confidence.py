"""How sure the router is. Needs a trace with router logits."""

import numpy as np
from scipy.special import log_softmax

from .tokens import Tokens

BF16_STEP = 2.0**-8  # half of the last place: what rounding can move a logit by, relative


def confidence(tokens: Tokens, layer: int) -> dict | None:
    """{domain: means over its tokens}; None without logits.

    ``entropy`` of the softmax over all E as a part of log E; ``top1``, the largest probability; ``margin`` from the
    largest logit of an unchosen expert to the smallest of a chosen one, with its median, negative where an expert bias
    decided; ``within_bfloat16``, the share of tokens that the logits decided and whose choice the rounding of these two
    to bfloat16 could change. NaN for a margin when all are chosen.
    """
    logits = tokens.router_logits(layer)
    if logits is None:
        return None
    logs = log_softmax(logits, axis=1)
    entropy = -(np.exp(logs) * logs).sum(1) / np.log(tokens.num_experts) if tokens.num_experts > 1 else logs[:, 0] * 0
    if tokens.top_k < tokens.num_experts:
        chosen = tokens.members(tokens.experts(layer))
        last, next_ = np.where(chosen, logits, np.inf).min(1), np.where(chosen, -np.inf, logits).max(1)
        margin = last - next_
        close = (margin >= 0) & (margin <= BF16_STEP * (np.abs(last) + np.abs(next_)))
    else:
        margin, close = np.full(len(tokens), np.nan), np.zeros(len(tokens), bool)
    result = {}
    for d, name in enumerate(tokens.names):
        mine = tokens.domain == d
        result[name] = {
            "entropy": float(entropy[mine].mean()),
            "top1": float(np.exp(logs[mine].max(1)).mean()),
            "margin": float(margin[mine].mean()),
            "margin_median": float(np.median(margin[mine])),
            "within_bfloat16": float(close[mine].mean()),
        }
    return result
