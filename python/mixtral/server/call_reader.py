"""Reads the text of tool calls piece by piece, as it is generated: the name of a call first, then its arguments."""

import json
import string
from collections.abc import Generator

_NAME = frozenset(string.ascii_letters + string.digits + "_-.")
_SPACE = frozenset(" \t\r\n")

Wait = Generator[None, None, None]  # waits for more text at each yield
Read = Generator[None, None, str]  # the same, and returns what it read


class _Broken(Exception):
    """The text is no tool call."""


class _Ended(Exception):
    """The text ended inside a call."""


class CallReader:
    """Feed it text, and take() what it found in it.

    Arguments are passed on as they are written, unchecked: an answer that was cut has cut arguments.

    Attributes:
        rest: the text that is no call, once closed.
    """

    def __init__(self) -> None:
        self._text, self._at = "", 0
        self._closed = False
        self._used = 0  # up to here the text has been passed on
        self._arguments: int | None = None  # where arguments that may be passed on go on
        self._found: list[tuple[str | None, str]] = []
        self._run: Wait | None = self._calls()
        self.rest = ""

    def feed(self, text: str) -> None:
        self._text += text
        if self._run is None:
            return
        try:
            next(self._run)
        except (StopIteration, _Broken, _Ended, ValueError):  # ValueError: json's
            self._run = None
        self._pass_on()

    def close(self) -> None:
        """Takes the end of the text."""
        self._closed = True
        self.feed("")
        self.rest = self._text[self._used :].strip(", \t\r\n")

    def take(self) -> list[tuple[str | None, str]]:
        """(name, "") where a call begins, then (None, part of its arguments)."""
        found, self._found = self._found, []
        return found

    def _begin(self, name: str) -> None:
        self._found.append((name, ""))
        self._used = self._at

    def _pass_on(self) -> None:
        if self._arguments is not None and self._arguments < self._at:
            self._found.append((None, self._text[self._arguments : self._at]))
            self._arguments = self._used = self._at

    # Calls

    def _calls(self) -> Wait:
        first = yield from self._skip_space()
        if first == "[":
            while first in ("[", ","):
                self._at += 1
                yield from self._call()
                first = yield from self._skip_space()
            yield from self._expect("]")
        elif first == "{":
            yield from self._call()
        else:
            yield from self._named_call()
        self._used = self._at

    def _call(self) -> Wait:
        """{"name": ..., "arguments": ...}, in either order, and perhaps with other members."""
        name = early = None
        begun = False  # the name is known, and arguments are on their way
        yield from self._skip_space()
        yield from self._expect("{")
        try:
            while True:
                key = json.loads((yield from self._string()))
                yield from self._skip_space()
                yield from self._expect(":")
                yield from self._skip_space()
                if key == "name" and not begun:
                    name = json.loads((yield from self._string()))
                    begun = True
                    self._begin(name)
                    if early is not None:
                        self._found.append((None, early))
                elif key == "arguments" and begun and early is None:
                    early = yield from self._stream()
                elif key == "arguments":
                    early = _opened((yield from self._value()))
                else:
                    yield from self._value()
                if (yield from self._skip_space()) != ",":
                    break
                self._at += 1
            yield from self._expect("}")
        except _Ended:
            if begun:
                self._used = len(self._text)
            raise
        if not begun:
            raise _Broken
        if early is None:
            self._found.append((None, "{}"))
        self._used = self._at

    def _named_call(self) -> Wait:
        """f[ARGS]{...} or f{...}"""
        begin = self._at
        while (yield from self._peek()) in _NAME:
            self._at += 1
        name = self._text[begin : self._at]
        if self._text[self._at] == "[":
            yield from self._expect("[ARGS]")
        if not name or (yield from self._skip_space()) != "{":
            raise _Broken
        self._begin(name)
        yield from self._stream()

    def _stream(self) -> Read:
        """Arguments, passed on as they come. Some models write them as a string that holds JSON: that is opened."""
        if (yield from self._peek()) == '"':
            text = _opened((yield from self._value()))
            self._found.append((None, text))
            return text
        self._arguments = self._at
        text = yield from self._value()
        self._pass_on()
        self._arguments = None
        return text

    # JSON: only where a value ends is looked at

    def _value(self) -> Read:
        begin, depth = self._at, 0
        while True:
            char = yield from self._peek()
            if char == '"':
                yield from self._string()
            elif char in "{[":
                depth += 1
                self._at += 1
            elif depth and char in "}]":
                depth -= 1
                self._at += 1
            elif depth:
                self._at += 1
            else:
                return (yield from self._scalar())
            if depth == 0:
                return self._text[begin : self._at]

    def _scalar(self) -> Read:
        begin = self._at
        while (yield from self._peek()) not in _SPACE and self._text[self._at] not in ",}]":
            self._at += 1
        if self._at == begin:
            raise _Broken
        return self._text[begin : self._at]

    def _string(self) -> Read:
        begin = self._at
        yield from self._skip_space()
        yield from self._expect('"')
        while (char := (yield from self._next())) != '"':
            if char == "\\":
                yield from self._next()
        return self._text[begin : self._at]

    # Characters

    def _peek(self) -> Read:
        while self._at == len(self._text):
            if self._closed:
                raise _Ended
            yield
        return self._text[self._at]

    def _next(self) -> Read:
        char = yield from self._peek()
        self._at += 1
        return char

    def _skip_space(self) -> Read:
        while (char := (yield from self._peek())) in _SPACE:
            self._at += 1
        return char

    def _expect(self, text: str) -> Wait:
        for expected in text:
            if (yield from self._next()) != expected:
                raise _Broken


def _opened(arguments: str) -> str:
    return json.loads(arguments) if arguments.startswith('"') else arguments
