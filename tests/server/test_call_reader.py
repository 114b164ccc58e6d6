"""The three shapes of tool calls, whole and cut anywhere, and text that is none."""

import json
import random

import pytest

from mixtral.server.call_reader import CallReader

ONE = '[{"name": "f", "arguments": {"a": "x]}\\"", "b": [1, {"c": null}]}}]'
ARGUMENTS = '{"a": "x]}\\"", "b": [1, {"c": null}]}'


def read(pieces: list[str]) -> tuple[list[tuple[str, str]], str]:
    """[(name, arguments)] and the rest."""
    reader, calls = CallReader(), []
    for piece in [*pieces, None]:
        reader.close() if piece is None else reader.feed(piece)
        for name, arguments in reader.take():
            if name is not None:
                assert arguments == ""
                calls.append((name, ""))
            else:
                calls[-1] = (calls[-1][0], calls[-1][1] + arguments)
    return calls, reader.rest


SHAPES = {
    "json": (ONE, [("f", ARGUMENTS)], ""),
    "json with space": (" [ " + ONE[1:-1] + "\n]\n", [("f", ARGUMENTS)], ""),
    "several": (ONE[:-1] + ', {"name":"g","arguments":{}}]', [("f", ARGUMENTS), ("g", "{}")], ""),
    "other members": ('[{"id": "abc", "name": "f", "arguments": {}, "x": [1.5e3]}]', [("f", "{}")], ""),
    "arguments first": ('[{"arguments": {"a": 1}, "name": "f"}]', [("f", '{"a": 1}')], ""),
    "arguments as text": ('[{"name": "f", "arguments": "{\\"a\\": 1}"}]', [("f", '{"a": 1}')], ""),
    "arguments as text first": ('[{"arguments": "{\\"a\\": 1}", "name": "f"}]', [("f", '{"a": 1}')], ""),
    "no arguments": ('[{"name": "f"}]', [("f", "{}")], ""),
    "one object": ('{"name": "f", "arguments": {"a": true}}', [("f", '{"a": true}')], ""),
    "marked": ('get_weather[ARGS]{"a": {"b": "}"}}', [("get_weather", '{"a": {"b": "}"}}')], ""),
    "bare": ('get-weather.v2{"a": 1}', [("get-weather.v2", '{"a": 1}')], ""),
    "bare, with space": ('get-weather.v2 {"a": 1}', [("get-weather.v2", '{"a": 1}')], ""),
    "escapes in the name": ('[{"name": "\\u0066", "arguments": {}}]', [("f", "{}")], ""),
    "text behind": (ONE + " and so on", [("f", ARGUMENTS)], "and so on"),
    "prose": (" I would call f", [], "I would call f"),
    "no name": ('[{"arguments": {}}]', [], '[{"arguments": {}}]'),
    "no list of calls": ("[1, 2]", [], "[1, 2]"),
    "broken between calls": (ONE[:-1] + "; {}]", [("f", ARGUMENTS)], "; {}]"),
    "broken second call": (ONE[:-1] + ", {]", [("f", ARGUMENTS)], "{]"),
    "empty": ("", [], ""),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str) -> None:
    text, calls, rest = SHAPES[name]
    assert read([text]) == (calls, rest)
    assert read(list(text)) == (calls, rest)


def test_a_name_comes_before_its_arguments_and_arguments_come_as_they_are_written() -> None:
    reader, seen = CallReader(), []
    for char in ONE:
        reader.feed(char)
        seen += reader.take()
    assert seen == [("f", "")] + [(None, char) for char in ARGUMENTS]


def test_a_cut_call_keeps_what_was_written() -> None:
    whole = json.dumps([{"name": "f", "arguments": {"a": [1, 2]}}, {"name": "g", "arguments": {}}])
    for end in range(len(whole) + 1):
        calls, rest = read([whole[:end]])
        named = [name for name in "fg" if end >= whole.index(f'"{name}"') + 3]
        assert [name for name, _ in calls] == named, whole[:end]
        assert not calls or '{"a": [1, 2]}'.startswith(calls[0][1])
        # Text again is only what names no call yet.
        second = whole.index('{"name": "g')
        unnamed = {0: whole[:end], 1: whole[second:end], 2: ""}[len(named)]
        assert rest == unnamed.strip(), whole[:end]


def test_anything_cut_anywhere_reads_the_same_and_never_fails() -> None:
    rng = random.Random(1)
    parts = [
        *(text for text, _, _ in SHAPES.values()),
        "{",
        "}",
        "[",
        "]",
        '"',
        "\\",
        ",",
        ":",
        '"name"',
        "é",
        "[ARGS]",
    ]
    for _ in range(2000):
        text = "".join(rng.choices(parts, k=rng.randrange(1, 4)))
        text = text[: rng.randrange(len(text) + 1)]
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(3))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert read([text]) == read(pieces) == read(list(text)), text
