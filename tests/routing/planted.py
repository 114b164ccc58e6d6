"""Routers whose metrics have closed forms, as traces."""

import numpy as np
import torch

from mixtral import Trace

DOCUMENT = 128  # tokens


def words(n: int, vocabulary: int = 400, seed: int = 0) -> np.ndarray:
    """int32 [n] token ids, frequent and rare ones as in text (Zipf)."""
    share = 1 / np.arange(1, vocabulary + 1)
    return np.random.default_rng(seed).choice(vocabulary, n, p=share / share.sum()).astype(np.int32)


def trace_of(topk_ids: np.ndarray, domain: np.ndarray, token_id: np.ndarray | None = None, **more) -> Trace:
    """A trace of these experts, int [N, L, K]; documents of 128 tokens that end with their domain."""
    n = len(topk_ids)
    tokens = words(n) if token_id is None else token_id
    starts = np.flatnonzero(np.diff(domain, prepend=-1))
    position = (np.arange(n) - np.repeat(starts, np.diff(starts, append=n))) % DOCUMENT
    fields = {
        "token_ids": tokens.astype(np.int32),
        "predicted_ids": np.roll(tokens, -1).astype(np.int32),
        "positions": position.astype(np.int32),
        "docs": (np.cumsum(position == 0) - 1).astype(np.int32),
        "domains": domain.astype(np.uint8),
        "special": np.zeros(n, bool),
        "topk_ids": topk_ids.astype(np.uint8),
        "topk_weights": np.full(topk_ids.shape, 1 / topk_ids.shape[2], np.float16),
    }
    tensors = {name: torch.from_numpy(array) for name, array in fields.items()}
    names = [f"domain{d}" for d in range(int(domain.max()) + 1)]
    others = {
        "router_logits": None,
        "next_gate_ids": None,
        "domain_names": names,
        "num_experts": 8,
        "model": "planted",
        "tokenizer": "",
    }
    return Trace(**(tensors | others | more))


def draw_pairs(rng: np.random.Generator, n: int, load: np.ndarray, top_k: int = 2) -> np.ndarray:
    """int [n, K] different experts, each drawn by ``load`` among those that are left."""
    # The largest of log load + Gumbel noise is a draw by load; the next ones are draws without replacement.
    noisy = np.log(load) + rng.gumbel(size=(n, len(load)))
    return np.argsort(-noisy, axis=1)[:, :top_k]


def blocks(n: int, num_domains: int) -> np.ndarray:
    """[n] domains, one after the other."""
    return np.arange(n) * num_domains // n


def markov(rng: np.random.Generator, position: np.ndarray, num_experts: int, q: float) -> np.ndarray:
    """[n] experts: that of the token before with probability q, else any one; anew where a document begins."""
    fresh = rng.integers(num_experts, size=len(position))
    copies = (rng.random(len(position)) < q) & (position > 0)
    source = np.maximum.accumulate(np.where(copies, 0, np.arange(len(position))))
    return fresh[source]
