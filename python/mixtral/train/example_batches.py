"""Batches of examples: whole documents packed behind each other, in an order that is a function of (seed, step)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from .batch import Batch, even_groups, full_groups
from .conversations import Document


class ExampleBatches:
    """The microbatches of each step.

    The documents stand in an endless row, epoch after epoch in an order of its own; step s takes those that begin in
    its part of the row, ``tokens_per_step`` long. No document is cut.
    """

    def __init__(self, documents: Sequence[Document], tokens_per_step: int, accumulation: int, seed: int) -> None:
        """
        Raises:
            ValueError: there is no document, or a longer one than a step.
        """
        if not documents:
            raise ValueError("there is no example to train on")
        self.documents, self.size, self.accumulation, self.seed = list(documents), tokens_per_step, accumulation, seed
        self.lengths = np.array([len(document.ids) for document in documents])
        if (longest := int(self.lengths.max())) > tokens_per_step:
            raise ValueError(f"tokens_per_step must be at least {longest}, the longest example, got {tokens_per_step}")
        self.tokens = int(self.lengths.sum())  # of an epoch

    def of_step(self, step: int) -> list[Document]:
        """The documents of one step; at least one."""
        begin, end = step * self.size, (step + 1) * self.size
        found = []
        for epoch in range(begin // self.tokens, -(-end // self.tokens)):
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.documents))
            begins = epoch * self.tokens + np.cumsum(self.lengths[order]) - self.lengths[order]
            chosen = order[(begin <= begins) & (begins < end)]
            found += [self.documents[i] for i in chosen]
        return found

    def __call__(self, step: int, context: int) -> list[Batch]:
        """The microbatches, each with about as many tokens."""
        return [pack(group) for group in even_groups(self.of_step(step), self.accumulation, _length) if group]


def _length(document: Document) -> int:
    return len(document.ids)


def pack(documents: Sequence[Document]) -> Batch:
    """Documents behind each other; none sees another."""
    return Batch.from_documents([d.ids for d in documents], [d.scored for d in documents])


class ExampleLoss:
    """Cross-entropy of the scored tokens of examples that are not trained on."""

    def __init__(self, documents: Sequence[Document], tokens_per_batch: int, device: str) -> None:
        self.batches = [pack(group).to(device) for group in full_groups(documents, tokens_per_batch, _length)]

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """{"held_out": {"cross_entropy", in nats per scored token, and "targets", their number}}, or {}."""
        nats = targets = 0.0
        for batch in self.batches:
            losses = model.loss(batch)
            nats += float(losses.cross_entropy) * float(losses.targets)
            targets += float(losses.targets)
        return {"held_out": {"cross_entropy": nats / targets, "targets": int(targets)}} if targets else {}
