"""Tokens as text, for log probabilities and /tokenize."""

from collections.abc import Sequence

from .. import _C
from ..tokenizer import Tokenizer

SPACE = "\u2581"  # how SentencePiece writes a space


class TokenTexts:
    """The texts of single tokens; each is made once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes]] = {}

    def text(self, token: int) -> str:
        """The token as it stands in a text, and "<s>" for a control token. A byte that is no character by itself is
        "bytes:\\\\xe6", as in OpenAI's answers."""
        return self._of(token)[0]

    def bytes(self, token: int) -> list[int]:
        """Those of the token in UTF-8; put together they are the text."""
        return list(self._of(token)[1])

    def top(self, pairs: Sequence[tuple[int, float]]) -> dict[str, float]:
        """By text; of several tokens with one text the likeliest."""
        result: dict[str, float] = {}
        for token, logprob in pairs:
            result.setdefault(self.text(token), logprob)
        return result

    def _of(self, token: int) -> tuple[str, bytes]:
        if token not in self._known:
            self._known[token] = self._make(token)
        return self._known[token]

    def _make(self, token: int) -> tuple[str, bytes]:
        piece = self._tokenizer.piece(token)
        if self._tokenizer.is_control(token):
            return piece, b""
        if not self._tokenizer.is_byte(token):
            text = piece.replace(SPACE, " ")
            return text, text.encode()
        byte = int(piece[1:-1], 16)
        return (chr(byte) if byte < 0x80 else f"bytes:\\x{byte:02x}"), bytes([byte])


class Offsets:
    """Where each token begins in the text, in characters."""

    def __init__(self, tokenizer: Tokenizer, continues_text: bool) -> None:
        self._decoder = _C.StreamingDecoder(tokenizer, continues_text)
        self.length = 0  # of the text so far

    def next(self, token: int) -> int:
        begin = self.length
        self.length += len(self._decoder.push(token))
        return begin
