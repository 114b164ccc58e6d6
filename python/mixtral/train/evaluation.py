"""Held-out text: bits per byte of a model, beside what ``xz -9`` makes of the same bytes."""

import lzma
import math
from typing import Any

from torch import nn

from ..tokenizer import Tokenizer
from .batch import Batch, full_groups
from .data import Domain
from .documents import Documents


class Evaluator:
    """Scores the held-out documents of each domain.

    Every document is scored on its own, from behind BOS to EOS, in windows of ``context`` tokens that overlap by a
    quarter, so that nearly every token is scored with three quarters of the context or all that there is. Its bytes are
    those of the decoded text. EOS counts as a target, BOS does not.
    """

    def __init__(
        self, domains: list[Domain], tokenizer: Tokenizer, context: int, batch_tokens: int, device: str
    ) -> None:
        self.device = device
        self.domains: dict[str, tuple[list[Batch], dict[str, Any]]] = {}
        for domain in domains:
            if not len(domain.held_out):
                continue
            text = b"".join(tokenizer.decode(ids).encode() for ids in domain.held_out)
            packed = 8 * len(lzma.compress(text, preset=9)) / len(text)
            batches = windows(domain.held_out, tokenizer, context, batch_tokens)
            self.domains[domain.name] = batches, {"bytes": len(text), "xz_bits_per_byte": packed}

    def __call__(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """By domain: bits_per_byte, xz_bits_per_byte, perplexity per token, tokens, bytes."""
        return {name: self._score(model, *held_out) for name, held_out in self.domains.items()}

    def _score(self, model: nn.Module, batches: list[Batch], facts: dict[str, Any]) -> dict[str, Any]:
        nats, tokens = 0.0, 0
        for batch in batches:
            losses = model.loss(batch.to(self.device))
            count = int(losses.targets)
            nats, tokens = nats + float(losses.cross_entropy) * count, tokens + count
        bits = nats / math.log(2) / facts["bytes"]
        return {"bits_per_byte": bits, "perplexity": math.exp(nats / tokens), "tokens": tokens, **facts}


def windows(documents: Documents, tokenizer: Tokenizer, context: int, batch_tokens: int) -> list[Batch]:
    """Batches of at most ``batch_tokens`` tokens, or one window, in which every token but BOS is a target once."""
    rows: list[tuple[list[int], list[bool]]] = []
    for document in documents:
        ids = [tokenizer.bos_id, *document, tokenizer.eos_id]
        scored = 1  # the tokens that have been targets, or need not be
        while scored < len(ids):
            begin = scored - max(1, context // 4) if scored > 1 else 0
            window = ids[begin : begin + context]
            rows.append((window, [begin + i >= scored for i in range(len(window))]))
            scored = begin + len(window)
    groups = full_groups(rows, batch_tokens, lambda row: len(row[0]))
    return [Batch.from_documents(*zip(*group, strict=True)) for group in groups]
