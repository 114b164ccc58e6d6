"""Passkey documents: a key hidden in filler, and the question for it, as ``mixtral passkey`` asks.

The texts are those of csrc/engine/passkey_prompt.cpp. The filler is that file's garbage, whose loss does not count, or
text of the training documents.
"""

from collections.abc import Sequence

import numpy as np

from ..tokenizer import Tokenizer
from .documents import Documents

GARBAGE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NAMES = (
    "quiet-river old-garden bright-house long-letter green-window early-winter warm-bridge small-forest clear-morning "
    "empty-station deep-valley gentle-teacher"
).split()
DIGITS = {"landmark": 5, "ruler": 7}  # of a key, as `mixtral passkey` has them; leading zeros are kept


def sentences(style: str, key: str, name: str) -> tuple[str, str, str]:
    """Introduction, needle and question; the answer follows the question and a space."""
    if style == "landmark":
        return (
            "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz "
            "you about the important information there.",
            f"The pass key is {key}. Remember it. {key} is the pass key.",
            "What is the pass key? The pass key is",
        )
    return (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.",
        f"One of the special magic numbers for {name} is: {key}.",
        f"What is the special magic number for {name} mentioned in the provided text? The special magic number for "
        f"{name} mentioned in the provided text is",
    )


class PasskeyMaker:
    """Makes passkey documents for one tokenizer.

    Lengths are log-uniform up to the context, depths uniform, half of the documents in each style and half of the
    filler garbage. The digits of the answer weigh ``weight`` in the loss, garbage nothing, all else 1.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[Documents], weight: float) -> None:
        """
        Args:
            texts: documents to take natural filler from; may be empty.
        """
        self.tokenizer, self.weight = tokenizer, weight
        self.texts = [t for t in texts if len(t)]
        self.newline = tokenizer.encode("a\n")[len(tokenizer.encode("a")) :]
        self.garbage = tokenizer.encode(GARBAGE * 8)
        self.repeated = tokenizer.encode(GARBAGE * 9)[len(self.garbage) :]
        self.digits_apart = sum(has_digit(tokenizer, i) for i in self._parts("landmark", "10234", "")[3])
        self.shortest = max(
            sum(map(len, self._parts(style, "0" * count, name))) + 2 * len(self.newline) + 1
            for style, count in DIGITS.items()
            for name in NAMES
        )

    def _parts(self, style: str, key: str, name: str) -> tuple[list[int], list[int], list[int], list[int]]:
        """Introduction behind BOS, needle, question and answer, as ids."""
        intro, needle, question = sentences(style, key, name)
        encode = self.tokenizer.encode
        answered, asked = encode(f"{question} {key}"), encode(question)
        same = 0
        while same < len(asked) and asked[same] == answered[same]:
            same += 1
        return encode(intro + "\n", add_bos=True), encode(needle + "\n"), answered[:same], answered[same:]

    def _filler(self, rng: np.random.Generator, count: int) -> tuple[list[int], float]:
        """``count`` tokens of garbage or of a text, and the weight of their loss."""
        if self.texts and rng.random() < 0.5:
            text = self.texts[rng.integers(len(self.texts))]
            begin = text.begins[rng.integers(len(text))]
            ids = [i for i in text.ids[begin : begin + 2 * count].tolist() if not self.tokenizer.is_control(i)]
            if len(ids) >= count:
                return ids[:count], 1.0
        ids = list(self.garbage)
        while len(ids) < count:
            ids += self.repeated
        return ids[:count], 0.0

    def lengths(self, rng: np.random.Generator, begin: float, end: float, longest: int) -> list[int]:
        """Log-uniform lengths in [shortest, longest] of the documents that fill the tokens from ``begin`` to ``end``.

        As many as have that many tokens on average: a document more or less, but no length is preferred.
        """
        if longest <= self.shortest:
            return []
        ratio = (longest + 1) / self.shortest
        mean = (longest + 1 - self.shortest) / np.log(ratio)
        count = int(end / mean) - int(begin / mean)
        return [int(self.shortest * ratio**share) for share in rng.random(count)]

    def make(self, rng: np.random.Generator, length: int) -> tuple[list[int], list[float]]:
        """A document of ``length`` tokens with BOS and EOS, and the weight of each token as a target."""
        style, name = list(DIGITS)[rng.integers(2)], NAMES[rng.integers(len(NAMES))]
        key = "".join(map(str, rng.integers(0, 10, DIGITS[style])))
        intro, needle, question, answer = self._parts(style, key, name)
        room = length - sum(map(len, (intro, needle, question, answer))) - 2 * len(self.newline) - 1
        filler, free = self._filler(rng, room)
        split = int(rng.integers(room + 1))
        parts = [
            (intro, 1.0),
            (filler[:split], free),
            (self.newline, 1.0),
            (needle, 1.0),
            (filler[split:], free),
            (self.newline, 1.0),
            (question, 1.0),
            *(([i], self.weight if has_digit(self.tokenizer, i) else 1.0) for i in answer),
            ([self.tokenizer.eos_id], 1.0),
        ]
        return [i for ids, _ in parts for i in ids], [w for ids, w in parts for _ in ids]


def has_digit(tokenizer: Tokenizer, id: int) -> bool:
    """Whether the text of a token holds a digit."""
    return any(character.isdigit() for character in tokenizer.decode([id]))
