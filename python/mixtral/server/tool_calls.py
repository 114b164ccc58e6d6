"""Tool calls in an answer, found by the token [TOOL_CALLS] while the answer is generated.

What stands behind the token has three shapes:

    [{"name": "f", "arguments": {...}}, ...]    Mixtral 8x22B and other models with tokenizers v2, v3 and v7
    f[ARGS]{...}                                later models of Mistral's, each call behind a token of its own
    f{...}                                      the same

Text that is none of these becomes content again: nothing that the model said is lost.
"""

import secrets
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .. import _C
from ..tokenizer import Tokenizer
from .call_reader import CallReader

TOOL_CALLS = "[TOOL_CALLS]"


def new_call_id() -> str:
    """An id that all of Mistral's chat formats take back."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


@dataclass
class CallPiece:
    """A part of a call. The first one of a call has its id and name; each may have arguments."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None

    def delta(self) -> dict[str, object]:
        """As in ``delta.tool_calls`` of a stream."""
        if self.name is None:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        function = {"name": self.name, "arguments": self.arguments}
        return {"index": self.index, "id": self.id, "type": "function", "function": function}


@dataclass
class Pieces:
    """What became known of an answer."""

    content: str = ""
    calls: list[CallPiece] = field(default_factory=list)

    def delta(self) -> dict[str, object]:
        """As in a stream; empty when nothing did."""
        delta: dict[str, object] = {"content": self.content} if self.content else {}
        return delta | {"tool_calls": [call.delta() for call in self.calls]} if self.calls else delta


class ToolParser:
    """Splits one answer into its text and its tool calls.

    Attributes:
        calls: how many have begun.
    """

    def __init__(self, tokenizer: Tokenizer, new_id: Callable[[], str] = new_call_id) -> None:
        self._tokenizer, self._new_id = tokenizer, new_id
        self._marker = tool_calls_id(tokenizer)
        self._decoder = _C.StreamingDecoder(tokenizer, continues_text=True)
        self._ahead = ""  # of the content: decoded here, while the engine holds it back for a stop string
        self._reader: CallReader | None = None
        self.calls = 0

    def push(self, text: str, token_ids: Sequence[int]) -> Pieces:
        """Takes new tokens, and the text that became certain with them, as the engine gives both."""
        pieces = Pieces()
        for token in token_ids:
            if token == self._marker:
                self._begin(pieces)
            elif self._reader is None:
                self._ahead += self._decoder.push(token)
            else:
                self._read(self._decoder.push(token), pieces)
        if self._reader is None:
            pieces.content, self._ahead = text, self._ahead[len(text) :]
        return pieces

    def finish(self) -> Pieces:
        """Takes the end of the answer."""
        pieces = Pieces()
        if self._reader is not None:
            self._read(self._decoder.flush(), pieces)
            self._close(pieces)
        return pieces

    def _begin(self, pieces: Pieces) -> None:
        rest = self._decoder.flush()
        if self._reader is None:
            pieces.content, self._ahead = self._ahead + rest, ""
        else:
            self._read(rest, pieces)
            self._close(pieces)
        self._decoder = _C.StreamingDecoder(self._tokenizer)
        self._reader = CallReader()

    def _read(self, text: str, pieces: Pieces) -> None:
        self._reader.feed(text)
        self._collect(pieces)

    def _close(self, pieces: Pieces) -> None:
        self._reader.close()
        self._collect(pieces)
        pieces.content += self._reader.rest

    def _collect(self, pieces: Pieces) -> None:
        for name, arguments in self._reader.take():
            if name is not None:
                self.calls += 1
                pieces.calls.append(CallPiece(self.calls - 1, arguments, self._new_id(), name))
            elif pieces.calls and pieces.calls[-1].index == self.calls - 1:
                pieces.calls[-1].arguments += arguments
            else:
                pieces.calls.append(CallPiece(self.calls - 1, arguments))


def tool_calls_id(tokenizer: Tokenizer) -> int | None:
    """The token that stands before tool calls; None for a tokenizer without one."""
    found = tokenizer.special_in(TOOL_CALLS)
    return found[0] if found else None
