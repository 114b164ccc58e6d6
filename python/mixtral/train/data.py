"""What a run reads: domains, tokenizer, and the microbatches of each step.

The order of documents is a function of (seed, step): each domain is an endless stream, epoch after epoch in an order of
its own, and step s takes the tokens from s to s + 1 shares of a step. Nothing has to be replayed to resume.
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..tokenizer import Tokenizer
from . import documents
from .batch import Batch, even_groups
from .documents import TOKEN_FILES, Documents
from .passkeys import DIGITS, PasskeyMaker
from .settings import DataSettings, DomainSettings, TrainSettings
from .toml_tables import SettingsError


@dataclass
class Domain:
    """One kind of text: documents to train on, and held out."""

    name: str
    weight: float
    train: Documents
    held_out: Documents


class Stream:
    """The documents of a domain as one endless row of tokens: BOS document EOS BOS document EOS and so on.

    Every epoch holds each document once, in an order that (seed, number of the domain, epoch) decides.
    """

    def __init__(self, docs: Documents, bos: int, eos: int, seed: int, number: int) -> None:
        self.docs, self.bos, self.eos, self.key = docs, bos, eos, (seed, number)
        self.lengths = docs.lengths()
        self.tokens = int(self.lengths.sum())  # of an epoch
        self._epoch: int | None = None

    def _enter(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([*self.key, epoch]).permutation(len(self.docs))
            self._ends = np.cumsum(self.lengths[self._order])

    def pieces(self, begin: int, end: int, context: int) -> list[list[int]]:
        """The tokens from ``begin`` to ``end``, cut where a document ends and after ``context`` tokens of one."""
        found = []
        while begin < end:
            epoch, place = divmod(begin, self.tokens)
            self._enter(epoch)
            number = int(np.searchsorted(self._ends, place, side="right"))
            left = int(self._ends[number]) - place  # of this document
            ids = [self.bos, *self.docs[int(self._order[number])], self.eos]
            start = len(ids) - left
            count = min(left, end - begin, context - start % context)
            found.append(ids[start : start + count])
            begin += count
        return found


class Mixture:
    """The microbatches of a step: of every domain its share of the tokens, and passkey documents."""

    def __init__(
        self,
        domains: list[Domain],
        data: DataSettings,
        train: TrainSettings,
        tokenizer: Tokenizer,
        source: str = "data",
    ) -> None:
        """
        Raises:
            SettingsError: passkeys with a tokenizer that joins digits, or a context too short for them.
        """
        self.train, self.passkeys = train, None
        if data.passkeys:
            texts = [d.train for d in domains]
            self.passkeys = PasskeyMaker(tokenizer, texts, data.passkey_weight)
            if self.passkeys.digits_apart != DIGITS["landmark"]:
                raise SettingsError(f"{source}: data.passkeys needs a tokenizer with a token for each digit")
            self.longest_passkey = data.passkey_context or train.context
            longest = min(self.longest_passkey, train.context)
            if longest <= self.passkeys.shortest:
                short = f"a context of {longest} is too short for passkeys"
                raise SettingsError(f"{source}: {short}, which have {self.passkeys.shortest} or more tokens")
        total = sum(d.weight for d in domains)
        self.shares = [(1 - data.passkeys) * d.weight / total for d in domains]
        self.passkey_share = data.passkeys
        self.streams = [
            Stream(d.train, tokenizer.bos_id, tokenizer.eos_id, train.seed, i) for i, d in enumerate(domains)
        ]

    def pieces(self, step: int, context: int) -> list[tuple[list[int], list[float] | None]]:
        """The documents of a step and the weights of their tokens as targets (None: all 1)."""
        size = self.train.tokens_per_step
        pieces: list[tuple[list[int], list[float] | None]] = []
        for stream, share in zip(self.streams, self.shares, strict=True):
            begin, end = int(step * size * share), int((step + 1) * size * share)
            pieces += [(ids, None) for ids in stream.pieces(begin, end, context) if len(ids) > 1]
        if self.passkeys is not None:
            rng = np.random.default_rng([self.train.seed, len(self.streams), step])
            share, longest = size * self.passkey_share, min(context, self.longest_passkey)
            for length in self.passkeys.lengths(rng, step * share, (step + 1) * share, longest):
                pieces.append(self.passkeys.make(rng, length))
        return pieces

    def __call__(self, step: int, context: int) -> list[Batch]:
        """The microbatches of a step, of about equal size; fewer than ``accumulation`` where documents are fewer."""
        groups = even_groups(self.pieces(step, context), max(self.train.accumulation, 1), lambda piece: len(piece[0]))
        return [pack(group) for group in groups if group]


def pack(pieces: list[tuple[list[int], list[float] | None]]) -> Batch:
    """Documents behind each other; none sees another."""
    batch = Batch.from_documents([ids for ids, _ in pieces])
    if all(weights is None for _, weights in pieces):
        return batch
    rows = [(weights or [1.0] * len(ids))[1:] for ids, weights in pieces]  # the first token of a document is no target
    return dataclasses.replace(batch, weights=torch.tensor([w for row in rows for w in row]))


# --- loading ----------------------------------------------------------------------------------------------------------


def load_texts(data: DataSettings, root: Path, source: str) -> dict[str, tuple[list[str], list[str]]]:
    """The texts of each domain: to train on, and held out. Token files are left to ``load_domains``."""
    return {name: documents.text_documents(name, domain, data, root, source) for name, domain in data.domains.items()}


def load_domains(
    data: DataSettings, texts: dict[str, tuple[list[str], list[str]]], tokenizer: Tokenizer, root: Path, source: str
) -> list[Domain]:
    """The domains as ids.

    Raises:
        SettingsError: a token file of another tokenizer, or a domain without documents.
    """
    domains = []
    for name, domain in data.domains.items():
        train, held_out = (documents.encode(part, tokenizer) for part in texts[name])
        train_tokens, held_out_tokens = _token_documents(name, domain, data, tokenizer, root, source)
        train, held_out = documents.join([train, *train_tokens]), documents.join([held_out, *held_out_tokens])
        if not len(train):
            raise SettingsError(f"{source}: data.domains.{name}: no documents to train on")
        domains.append(Domain(name, domain.weight, train, held_out))
    return domains


def _token_documents(
    name: str, domain: DomainSettings, data: DataSettings, tokenizer: Tokenizer, root: Path, source: str
) -> tuple[list[Documents], list[Documents]]:
    where = f"{source}: data.domains.{name}"

    def read(patterns: list[str]) -> list[Documents]:
        files = [f for f in documents.find(patterns, root, where) if f.suffix in TOKEN_FILES]
        return [documents.read_tokens(f, data.token_type, tokenizer, tokenizer.vocab_size) for f in files]

    train, held_out = read(domain.files), read(domain.held_out)
    if domain.held_out_share:
        masks = [documents.every_nth(len(docs), domain.held_out_share) for docs in train]
        held_out = [docs.part(mask) for docs, mask in zip(train, masks, strict=True)]
        train = [docs.part(~mask) for docs, mask in zip(train, masks, strict=True)]
    return train, held_out


def digest(domains: list[Domain]) -> str:
    """SHA-256 of all documents of a run."""
    parts = [f"{d.name} {d.train.digest} {len(d.train)} {d.held_out.digest} {len(d.held_out)}" for d in domains]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
