"""From texts to a trace: the documents that are read, and the model's routing of them."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LoadError
from .tokens import check_size

if TYPE_CHECKING:
    from ..model import Mixtral
    from ..tokenizer import Tokenizer
    from ..trace import Trace

LONGEST_TOKEN = 16  # characters of text that may have to be read for a token


@dataclass
class Text:
    """One text: a domain, or one language of a parallel text."""

    name: str
    text: str
    file: str


def read_texts(flag: str, arguments: Sequence[str]) -> list[Text]:
    """The files of ``--domain NAME=FILE`` or ``--parallel LANG=FILE``.

    Raises:
        ValueError: an argument without a name or file, a name given twice, or an empty file.
        LoadError: a file that cannot be read, or is no UTF-8 text.
    """
    texts: dict[str, Text] = {}
    for argument in arguments:
        name, equals, file = argument.partition("=")
        if not (name and equals and file):
            raise ValueError(f"{flag}: expected NAME=FILE, got {argument}")
        if name in texts:
            raise ValueError(f"{flag}: {name} is given twice")
        texts[name] = Text(name, _read(file), file)
        if not texts[name].text.strip():
            raise ValueError(f"{flag}: {name} is empty: {file}")
    return list(texts.values())


def trace_texts(
    model: "Mixtral",
    domains: Sequence[Text],
    languages: Sequence[Text],
    *,
    tokens: int = 0,
    document_tokens: int = 512,
    least: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> "Trace":
    """Trace the beginning of each text, cut into documents; languages are domains too.

    Args:
        tokens: of all texts together, in equal parts, BOS included; 0: everything. Parallel texts end at the same line.
        document_tokens: of a document, BOS included.
        least: tokens of each text, without BOS.

    Raises:
        ValueError: parallel texts of different numbers of lines, a name that is a domain and a language, or fewer
            tokens of a text than ``least``.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError("route: model expected a tokenizer, got none")
    if twice := {text.name for text in domains} & {text.name for text in languages}:
        raise ValueError(f"--parallel: {min(twice)} is the name of a domain too")
    share = tokens // (len(domains) + len(languages)) if tokens else sys.maxsize
    if share < 2:
        raise ValueError(f"--tokens: expected at least 2 for each text, got {tokens}")
    pieces = [(text.name, _ids(tokenizer, text.text, share)) for text in domains]
    pieces += _aligned(tokenizer, languages, share)
    documents = [(name, _cut(ids, tokenizer, share, document_tokens)) for name, ids in pieces]
    for name, parts in documents:
        check_size(name, sum(len(part) - 1 for part in parts), least)
    names, prompts = zip(*((name, part) for name, parts in documents for part in parts), strict=True)
    return model.trace(prompts, domains=names, logits=True, progress=progress)


def _read(file: str) -> str:
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise LoadError(f"{file}: no UTF-8 text: byte {error.start}", file, "", "no UTF-8 text") from None
    except OSError as error:
        raise LoadError(f"{file}: {error.strerror}", file, "", str(error.strerror)) from None
    if "\0" in text:
        raise LoadError(f"{file}: no text: it has a zero byte", file, "", "no text")
    return text


def _ids(tokenizer: "Tokenizer", text: str, most: int) -> list[int]:
    return tokenizer.encode(text[: most * LONGEST_TOKEN])[:most]


def _aligned(tokenizer: "Tokenizer", languages: Sequence[Text], most: int) -> list[tuple[str, list[int]]]:
    """The first lines of every language, as many as fit ``most`` tokens in each of them."""
    lines = [text.text.splitlines(keepends=True) for text in languages]
    for text, found in zip(languages, lines, strict=True):
        if len(found) != len(lines[0]):
            expected = f"{len(lines[0])} lines as in {languages[0].file}"
            raise ValueError(f"--parallel: {text.name}: expected {expected}, got {len(found)}")
    kept: list[list[int]] = [[] for _ in languages]
    for row in zip(*lines, strict=True):
        more = [tokenizer.encode(line) for line in row]
        if any(len(ids) + len(new) > most for ids, new in zip(kept, more, strict=True)):
            break
        for ids, new in zip(kept, more, strict=True):
            ids += new
    return [(text.name, ids) for text, ids in zip(languages, kept, strict=True)]


def _cut(ids: list[int], tokenizer: "Tokenizer", most: int, document_tokens: int) -> list[list[int]]:
    """Documents of at most ``document_tokens``, each behind a BOS token; ``most`` tokens in all."""
    step, bos = document_tokens - 1, tokenizer.bos_id
    documents = [[bos, *ids[begin : begin + step]] for begin in range(0, len(ids), step)]
    while documents and (excess := sum(map(len, documents)) - most) > 0:
        documents[-1] = documents[-1][: max(len(documents[-1]) - excess, 0)]
        if len(documents[-1]) < 2:
            documents.pop()
    return documents
