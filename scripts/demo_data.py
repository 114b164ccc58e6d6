"""Text for the demo model: the King James Bible and the SQLite documentation, both in the public domain.

    apt install bible-kjv bible-kjv-text sqlite3-doc
    python scripts/demo_data.py                # writes build/demo_data, in some seconds

models/demo.toml says how the model is trained on it.

Nothing is downloaded. Whole books and whole pages are held out for evaluation. To train on, every chapter and every
page is there three times: whole with its title, whole without it, and cut into passages of some paragraphs. So a
document may begin with a title, as a chapter or a page begins, or in the middle, and its first words say of which
domain it is.

A third domain, `lookups`, is made up: lists that repeat, and keys that are named once and asked for later. Text of this
size does not teach attention to copy what stands further back, which is what a passkey needs; these documents do, when
the model learns from them first.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SQLITE_DOC = Path("/usr/share/doc/sqlite3")
PACKAGES = ("bible-kjv-text", "sqlite3-doc")
HELD_OUT_BOOKS = ("Luke", "Acts")
HELD_OUT_EVERY = 20  # every 20th page of the SQLite documentation

BOOKS = [
    name.replace("_", " ")
    for name in (
        "Genesis Exodus Leviticus Numbers Deuteronomy Joshua Judges Ruth 1_Samuel 2_Samuel 1_Kings 2_Kings "
        "1_Chronicles 2_Chronicles Ezra Nehemiah Esther Job Psalm Proverbs Ecclesiastes Song_of_Solomon Isaiah "
        "Jeremiah Lamentations Ezekiel Daniel Hosea Joel Amos Obadiah Jonah Micah Nahum Habakkuk Zephaniah Haggai "
        "Zechariah Malachi Matthew Mark "
        "Luke John Acts Romans 1_Corinthians 2_Corinthians Galatians Ephesians Philippians Colossians 1_Thessalonians "
        "2_Thessalonians 1_Timothy 2_Timothy Titus Philemon Hebrews James 1_Peter 2_Peter 1_John 2_John 3_John Jude "
        "Revelation"
    ).split()
]

# Generated indexes, copies of other pages, and pages without prose.
SKIPPED_PAGES = re.compile(
    r"^(requirements|syntaxdiagrams|keyword_index|doc_\w+_crossref|fileformat|capi3ref|sitemap|search|session/intro|"
    r"c3ref/(intro|funclist|objlist|constlist)|session/(funclist|objlist|constlist)|docs|index|download|toc_db|"
    r"syntax/.*)\.html$"
)


@dataclass
class Document:
    """One chapter or one page: a title and its paragraphs."""

    title: str
    paragraphs: list[str]

    @property
    def text(self) -> str:
        return "\n\n".join([self.title, *self.paragraphs]) + "\n"


@dataclass
class Corpus:
    """One domain, split by whole books or pages."""

    name: str
    train: list[Document] = field(default_factory=list)
    held_out: list[Document] = field(default_factory=list)

    def sha256(self) -> str:
        """Checksum of the text of both splits, in order."""
        return hashlib.sha256("".join(d.text for d in self.train + self.held_out).encode()).hexdigest()


def load_bible() -> Corpus:
    """The King James Bible: a document per chapter, three to seven verses to a paragraph."""
    command = ["bible", "-f", "gen1:1-rev22:21"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    chapters: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        reference, verse = line.split(" ", 1)
        book, chapter = re.fullmatch(r"(\w+?)(\d+):\d+", reference).groups()
        chapters.setdefault((book, chapter), []).append(verse.strip())
    names = dict(zip(dict.fromkeys(book for book, _ in chapters), BOOKS, strict=True))

    corpus = Corpus("bible")
    rng = random.Random(0)
    for (book, chapter), verses in chapters.items():
        paragraphs = []
        while verses:
            count = rng.randint(3, 7)
            paragraphs.append(" ".join(verses[:count]))
            verses = verses[count:]
        split = corpus.held_out if names[book] in HELD_OUT_BOOKS else corpus.train
        split.append(Document(f"{names[book]} {chapter}", paragraphs))
    return corpus


class _Prose(HTMLParser):
    """Collects the title and the paragraphs of one page; drops menus, scripts, drawings and forms."""

    SKIPPED = {"script", "style", "svg", "button", "form", "select"}
    BLOCKS = {
        "p",
        "div",
        "li",
        "ul",
        "ol",
        "dl",
        "dt",
        "dd",
        "tr",
        "table",
        "blockquote",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "br",
        "hr",
        "pre",
        "center",
        "td",
        "th",
    }

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.title = ""
        self.paragraphs: list[str] = []
        self._text: list[str] = []
        self._skip = 0  # depth inside skipped elements
        self._menu = 0  # depth of <div>s inside a menu or a drawing
        self._pre = False
        self._in_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag == "div" and (self._menu or attributes.get("class") in ("nosearch", "imgcontainer")):
            self._menu += 1
        if tag in self.SKIPPED:
            self._skip += 1
        elif tag == "title":
            self._in_title = True
        elif tag in self.BLOCKS and not (self._pre and tag == "br"):
            self._end_block()
            self._pre = self._pre or tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag in self.SKIPPED:
            self._skip = max(0, self._skip - 1)
        elif tag == "title":
            self._in_title = False
        elif tag in self.BLOCKS:
            self._end_block()
            if tag == "pre":
                self._pre = False
        if tag == "div" and self._menu:
            self._menu -= 1

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data
        elif not self._skip and not self._menu:
            self._text.append(data)

    def _end_block(self) -> None:
        text = "".join(self._text)
        self._text.clear()
        if self._pre:
            text = "\n".join(line.rstrip() for line in text.expandtabs(4).strip("\n").splitlines())
        else:
            text = " ".join(text.split())
        if text.strip():
            self.paragraphs.append(text)

    def close(self) -> None:
        super().close()
        self._end_block()


def _page(path: Path, seen: set[str]) -> Document:
    """One page as a document; paragraphs that an earlier page already had are dropped."""
    parser = _Prose()
    parser.feed(path.read_text(encoding="utf-8", errors="replace"))
    parser.close()
    kept: list[str] = []
    for paragraph in parser.paragraphs:
        mostly_letters = sum(c.isalpha() or c.isspace() for c in paragraph) > 0.6 * len(paragraph)
        if len(paragraph) < 25 or not paragraph.isascii() or not mostly_letters or paragraph in seen:
            continue
        if paragraph.startswith("This page last modified"):
            continue
        seen.add(paragraph)
        kept.append(paragraph)
    return Document(" ".join(parser.title.split()) or path.stem, kept)


def load_sqlite_doc(root: Path = SQLITE_DOC) -> Corpus:
    """The SQLite documentation: a document per page, prose and code, without menus, indexes and repeated text."""
    corpus = Corpus("sqlite")
    seen: set[str] = set()
    pages = sorted(p for p in root.rglob("*.html") if not SKIPPED_PAGES.match(str(p.relative_to(root))))
    for number, path in enumerate(pages):
        document = _page(path, seen)
        if sum(map(len, document.paragraphs)) < 200:
            continue
        split = corpus.held_out if number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else corpus.train
        split.append(document)
    return corpus


def passages(document: Document, target: int = 600) -> list[str]:
    """The document cut, between paragraphs, into untitled pieces of about `target` characters."""
    pieces: list[str] = []
    current: list[str] = []
    for paragraph in document.paragraphs:
        current.append(paragraph)
        if sum(map(len, current)) >= target:
            pieces.append("\n\n".join(current) + "\n")
            current = []
    if current:
        pieces.append("\n\n".join(current) + "\n")
    return pieces


def load_corpora() -> list[Corpus]:
    """Both domains."""
    return [load_bible(), load_sqlite_doc()]


def package_versions() -> dict[str, str]:
    """Versions of the Debian packages that the text comes from."""
    command = ["dpkg-query", "-W", "-f=${Package} ${Version}\n", *PACKAGES]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(line.split(" ") for line in output.splitlines())


def forms(document: Document) -> list[str]:
    """A document as it is trained on: whole with its title, whole without, and in passages."""
    whole = "\n\n".join(document.paragraphs) + "\n"
    return [document.text, whole, *passages(document)]


def common_words(corpora: list[Corpus], count: int = 300) -> list[str]:
    """The most frequent words of four to eight small letters in the training texts."""
    found = Counter(w for c in corpora for d in c.train for w in re.findall(r"\b[a-z]{4,8}\b", d.text))
    return sorted(word for word, _ in found.most_common(count))


def lookup(rng: random.Random, words: list[str]) -> str:
    """A list of words and numbers, two to five times; or keys, each of a word, and some of them again."""

    def number() -> str:
        return "".join(rng.choices("0123456789", k=rng.randint(3, 7)))

    size = int(2 ** rng.uniform(1, 4.5))
    if rng.random() < 0.5:
        row = " ".join(rng.choice(words) if rng.random() < 0.6 else number() for _ in range(size))
        return "\n".join([row] * rng.randint(2, 5)) + "\n"
    keys = [f"The key of {word} is {number()}." for word in rng.sample(words, size)]
    return " ".join(keys) + "\n" + " ".join(rng.choices(keys, k=rng.randint(2, 8))) + "\n"


def lookups(corpora: list[Corpus]) -> dict[str, list[str]]:
    """The made-up documents of both splits."""
    rng, words = random.Random(0), common_words(corpora)
    return {split: [lookup(rng, words) for _ in range(count)] for split, count in (("train", 30000), ("held_out", 100))}


def write(folder: Path) -> None:
    """NAME.train.jsonl and NAME.held_out.jsonl of every domain: an object {"text": ...} a line."""
    folder.mkdir(parents=True, exist_ok=True)
    print(", ".join(f"{package} {version}" for package, version in package_versions().items()))
    corpora = load_corpora()
    for corpus in corpora:
        train = [text for document in corpus.train for text in forms(document)]
        write_domain(folder, corpus.name, {"train": train, "held_out": [d.text for d in corpus.held_out]})
        print(f"  sha256 of the text, without its repetitions: {corpus.sha256()}")
    write_domain(folder, "lookups", lookups(corpora))


def write_domain(folder: Path, name: str, texts: dict[str, list[str]]) -> None:
    for split, documents in texts.items():
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents]
        path = folder / f"{name}.{split}.jsonl"
        path.write_text("".join(lines), encoding="utf-8")
        print(f"{path}: {len(documents)} documents, {sum(len(text.encode()) for text in documents)} bytes of text")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "demo_data")
