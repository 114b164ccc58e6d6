"""Documents of a domain: read from text files, JSONL and token files, as ids without BOS and EOS."""

import glob
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..tokenizer import Tokenizer
from .settings import DataSettings, DomainSettings
from .toml_tables import SettingsError

TOKEN_FILES = (".npy", ".bin")


def find(patterns: Sequence[str], root: Path, where: str) -> list[Path]:
    """The files of paths and globs, relative to ``root``, each once, in the order of the patterns.

    Raises:
        SettingsError: a pattern that matches no file.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        matches = sorted(glob.glob(str(root / Path(pattern).expanduser()), recursive=True))
        found = [Path(match) for match in matches if Path(match).is_file()]
        if not found:
            raise SettingsError(f"{where}: no file matches {root / pattern}")
        files |= dict.fromkeys(found)
    return list(files)


def read_texts(file: Path, separator: str, text_field: str) -> Iterator[str]:
    """The documents of a text file; empty ones are left out.

    Raises:
        SettingsError: no UTF-8, or a line of a .jsonl without a text.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SettingsError(f"{file}: not UTF-8 at byte {error.start}") from None
    if file.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                document = json.loads(line)[text_field]
            except (json.JSONDecodeError, KeyError, TypeError):
                document = None
            if not isinstance(document, str):
                raise SettingsError(f"{file}: line {number} is no object with a string {text_field!r}")
            if document.strip():
                yield document
    else:
        yield from (part for part in (text.split(separator) if separator else [text]) if part.strip())


@dataclass
class Documents:
    """Token ids of many documents in one array.

    ``ids`` is uint16 or uint32, possibly a file mapped into memory. Document i is ids[begins[i]:ends[i]], without BOS
    and EOS. ``digest`` is the SHA-256 of what was read.
    """

    ids: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    digest: str

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, index: int) -> list[int]:
        return self.ids[self.begins[index] : self.ends[index]].tolist()

    def lengths(self) -> np.ndarray:
        """Tokens of each document with BOS and EOS."""
        return self.ends - self.begins + 2

    def part(self, chosen: np.ndarray) -> "Documents":
        """Some of the documents, by a mask."""
        return Documents(self.ids, self.begins[chosen], self.ends[chosen], self.digest)


def encode(texts: Sequence[str], tokenizer: Tokenizer) -> Documents:
    """The documents of texts."""
    encoded = [np.asarray(tokenizer.encode(text), dtype=np.uint32) for text in texts]
    ends = np.cumsum([len(ids) for ids in encoded], dtype=np.int64) if encoded else np.zeros(0, np.int64)
    begins = np.concatenate([[0], ends[:-1]]).astype(np.int64) if encoded else ends
    ids = np.concatenate(encoded) if encoded else np.zeros(0, np.uint32)
    digest = hashlib.sha256(b"\0".join(text.encode() for text in texts)).hexdigest()
    return Documents(ids, begins, ends, digest)


def read_tokens(file: Path, token_type: str, tokenizer: Tokenizer, vocab_size: int) -> Documents:
    """The documents of a file of token ids, which EOS ends; a BOS before one is not part of it.

    Raises:
        SettingsError: another type of number, more than one dimension, or an id outside the vocabulary.
    """
    try:
        ids = np.load(file, mmap_mode="r") if file.suffix == ".npy" else np.memmap(file, token_type, mode="r")
    except (ValueError, OSError) as error:
        raise SettingsError(f"{file}: no token file: {error}") from None
    if ids.ndim != 1 or ids.dtype not in (np.uint16, np.uint32):
        raise SettingsError(f"{file}: expected one row of uint16 or uint32, got {ids.dtype} {list(ids.shape)}")
    if len(ids) and (largest := int(ids.max())) >= vocab_size:
        raise SettingsError(
            f"{file}: holds id {largest}, the vocabulary ends at {vocab_size - 1}: another tokenizer's?"
        )
    eos = np.flatnonzero(ids == tokenizer.eos_id).astype(np.int64)
    ends = eos if len(eos) and eos[-1] == len(ids) - 1 else np.append(eos, len(ids))
    begins = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)
    begins += (begins < ends) & (ids[np.minimum(begins, len(ids) - 1)] == tokenizer.bos_id)
    full = begins < ends
    return Documents(ids, begins[full], ends[full], hashlib.sha256(ids).hexdigest())


def join(parts: Sequence[Documents]) -> Documents:
    """The documents of several files as one."""
    parts = [part for part in parts if len(part)] or list(parts[:1])
    if len(parts) == 1:
        return parts[0]
    offsets = np.cumsum([0, *(len(p.ids) for p in parts)])
    return Documents(
        np.concatenate([p.ids for p in parts]),
        np.concatenate([p.begins + offset for p, offset in zip(parts, offsets, strict=False)]),
        np.concatenate([p.ends + offset for p, offset in zip(parts, offsets, strict=False)]),
        hashlib.sha256("".join(p.digest for p in parts).encode()).hexdigest(),
    )


def every_nth(total: int, share: float) -> np.ndarray:
    """A mask over ``total`` documents with ``share`` of them, evenly spread, at least one."""
    counts = np.floor(np.arange(1, total + 1) * share + 1e-9)
    chosen = np.diff(counts, prepend=0) > 0
    if share > 0 and not chosen.any():
        chosen[-1] = True
    return chosen


def text_documents(
    name: str, domain: DomainSettings, data: DataSettings, root: Path, source: str
) -> tuple[list[str], list[str]]:
    """The texts of a domain: to train on, and held out. Token files have none."""
    where = f"{source}: data.domains.{name}"

    def texts(patterns: Sequence[str]) -> list[str]:
        files = [f for f in find(patterns, root, where) if f.suffix not in TOKEN_FILES]
        return [text for file in files for text in read_texts(file, data.separator, data.text_field)]

    train, held_out = texts(domain.files), texts(domain.held_out)
    if domain.held_out_share:
        mask = every_nth(len(train), domain.held_out_share)
        held_out = [text for text, out in zip(train, mask, strict=True) if out]
        train = [text for text, out in zip(train, mask, strict=True) if not out]
    return train, held_out
