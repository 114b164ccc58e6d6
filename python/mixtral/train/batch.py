"""What a model trains on: packed sequences with their labels, and the totals that make losses additive.

Letters: T tokens of all sequences, B sequences, S length of a padded row, L layers, E experts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from .cross_entropy import IGNORED

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Sequences one behind the other, without padding.

    Attributes:
        input_ids: int64 [T].
        labels: int64 [T], the token that should follow each input; -100 where there is no loss.
        positions: int64 [T], of each token in its sequence.
        cu_seqlens: int32 [B + 1], where each sequence starts, and T.
        weights: f32 [T], of the labels; None: 1 each.
    """

    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    weights: Tensor | None = None

    @classmethod
    def from_documents(
        cls, documents: Sequence[Sequence[int]], scored: Sequence[Sequence[bool]] | None = None
    ) -> "Batch":
        """Each document predicts its own tokens from the second on: n ids give n - 1 inputs.

        Args:
            documents: token ids; those of fewer than two are left out.
            scored: for every token of every document whether it is to be predicted; None: all are.

        Raises:
            ValueError: no document has two tokens, or ``scored`` has other lengths.
        """
        if scored is not None and [len(d) for d in documents] != [len(s) for s in scored]:
            raise ValueError("Batch: scored must have one value for every token of documents")
        used = [d for d in range(len(documents)) if len(documents[d]) > 1]
        if not used:
            raise ValueError("Batch: documents must hold one of at least two tokens")
        ids = [torch.as_tensor(documents[d], dtype=torch.int64) for d in used]
        labels = torch.cat([x[1:] for x in ids])
        if scored is not None:
            labels[~torch.cat([torch.as_tensor(scored[d], dtype=torch.bool)[1:] for d in used])] = IGNORED
        return cls(torch.cat([x[:-1] for x in ids]), labels, *_places(torch.tensor([len(x) - 1 for x in ids])))

    @classmethod
    def from_padded(cls, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None):
        """From rows as transformers has them.

        Args:
            input_ids: int64 [B, S].
            attention_mask: [B, S], not zero for a token, zero for padding on the left or the right; None: no padding.
            labels: int64 [B, S], not shifted: ``labels[b, s]`` is predicted from the tokens before s, unless it is
                -100. None: ``input_ids``.
        """
        is_token = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
        labels = (input_ids if labels is None else labels).masked_fill(~is_token, IGNORED)
        shifted = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        lengths = is_token.sum(1)
        return cls(input_ids[is_token], shifted[is_token], *_places(lengths[lengths > 0]))

    @property
    def tokens(self) -> int:
        return len(self.input_ids)

    @property
    def targets(self) -> Tensor:
        """f32 []: the number of labels, or the sum of their weights."""
        is_target = self.labels != IGNORED
        return is_target.sum().float() if self.weights is None else self.weights[is_target].sum()

    def to(self, device: torch.device | str) -> "Batch":
        parts = [getattr(self, field.name) for field in fields(self)]
        return Batch(*(None if x is None else x.to(device, non_blocking=True) for x in parts))


def _places(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [B] -> positions int64 [T], cu_seqlens int32 [B + 1]."""
    ends = lengths.cumsum(0)
    starts = torch.repeat_interleave(ends - lengths, lengths)
    positions = torch.arange(len(starts), device=lengths.device) - starts
    return positions, functional.pad(ends, (1, 0)).int()


def even_groups(items: Iterable[T], count: int, length: Callable[[T], int]) -> list[list[T]]:
    """``count`` groups of about equal total length: the longest items first, each where most room is."""
    groups: list[list[T]] = [[] for _ in range(count)]
    for item in sorted(items, key=lambda item: -length(item)):
        min(groups, key=lambda group: sum(map(length, group))).append(item)
    return groups


def full_groups(items: Iterable[T], most: int, length: Callable[[T], int]) -> Iterator[list[T]]:
    """The items in order, in groups of a total length of at most ``most``, or of one item."""
    group: list[T] = []
    for item in items:
        if group and sum(map(length, group)) + length(item) > most:
            yield group
            group = []
        group.append(item)
    if group:
        yield group


class StepTotals(NamedTuple):
    """Totals over all microbatches and ranks of an optimizer step."""

    targets: float | Tensor  # labels, or the sum of their weights (Batch.targets)
    tokens: int | Tensor
    load: Tensor | None = None  # [L, E], tokens that chose an expert, for balance "global"; None: those of the batch


class Losses(NamedTuple):
    """The share of a microbatch in the losses of its step; shares of all microbatches and ranks add up to the step's.

    ``total = cross_entropy + balance_coefficient * balance + z_coefficient * z``; balance counts for "switch" and
    "global" alone.
    """

    total: Tensor  # f32 [], with gradient
    cross_entropy: Tensor  # f32 [], mean over targets
    balance: Tensor  # f32 [], mean over layers; 0 for a dense model
    z: Tensor  # f32 [], mean over tokens and layers
    targets: Tensor  # f32 [], of this microbatch
    tokens: int  # of this microbatch
    load: Tensor  # int64 [L, E], tokens of this microbatch that chose an expert; [0, 0] for a dense model
    max_logit: Tensor  # f32 [L], largest magnitude of a router's logit
