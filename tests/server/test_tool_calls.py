"""Tool calls found by token id, in answers as the engine gives them: ids, and text that may lag behind."""

import itertools
import json
import random
from pathlib import Path

import mistral_common
import pytest

import mixtral
from mixtral import _C
from mixtral.server.tool_calls import ToolParser, new_call_id, tool_calls_id

DATA = Path(mistral_common.__file__).parent / "data"
FILES = ["240216.model.v2", "240323.model.v3", "241114.model.v7"]
ONE = '[{"name": "get_weather", "arguments": {"city": "Köln 日本"}}]'
TWO = [("get_weather", '{"city": "Köln 日本"}'), ("now", "{}")]


@pytest.fixture(scope="module", params=FILES)
def tokenizer(request: pytest.FixtureRequest) -> mixtral.Tokenizer:
    return mixtral.Tokenizer(DATA / f"mistral_instruct_tokenizer_{request.param}")


def parse(tokenizer: mixtral.Tokenizer, pieces: list[tuple[str, list[int]]]) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls of (text, ids) as the engine gives them."""
    numbers = itertools.count(100_000_000)
    parser = ToolParser(tokenizer, new_id=lambda: str(next(numbers)))
    content, calls = "", []
    for found in [*(parser.push(*piece) for piece in pieces), parser.finish()]:
        content += found.content
        for piece in found.calls:
            if piece.name is not None:
                assert (piece.index, piece.id) == (len(calls), str(100_000_000 + len(calls)))
                calls.append((piece.name, piece.arguments))
            else:
                assert piece.index == len(calls) - 1
                calls[-1] = (calls[-1][0], calls[-1][1] + piece.arguments)
    assert parser.calls == len(calls)
    return content, calls


def as_engine(tokenizer: mixtral.Tokenizer, ids: list[int], held: int = 0) -> list[tuple[str, list[int]]]:
    """One piece a token; the text ``held`` characters late, as while a stop string may be incomplete."""
    decoder, ahead, pieces = _C.StreamingDecoder(tokenizer, continues_text=True), "", []
    for place, token in enumerate(ids):
        ahead += decoder.push(token)
        last = place == len(ids) - 1
        if last:
            ahead += decoder.flush()
        known = len(ahead) if last else max(len(ahead) - held, 0)
        pieces.append((ahead[:known], [token]))
        ahead = ahead[known:]
    return pieces


def whole(tokenizer: mixtral.Tokenizer, ids: list[int]) -> list[tuple[str, list[int]]]:
    pieces = as_engine(tokenizer, ids)
    return [("".join(text for text, _ in pieces), ids)]


@pytest.mark.parametrize("held", [0, 7])
@pytest.mark.parametrize(
    "shape",
    ["[TOOL_CALLS]" + ONE[:-1] + ', {"name": "now", "arguments": {}}]',
     '[TOOL_CALLS]get_weather[ARGS]{"city": "Köln 日本"}[TOOL_CALLS]now[ARGS]{}',
     '[TOOL_CALLS]get_weather{"city": "Köln 日本"}[TOOL_CALLS]now{}'],
    ids=["json", "marked", "bare"],
)  # fmt: skip
@pytest.mark.parametrize("text", ["", " Let me see: é"])
def test_calls_behind_text(tokenizer: mixtral.Tokenizer, shape: str, held: int, text: str) -> None:
    ids = tokenizer.encode(text) + tokenizer.encode(shape, parse_special=True)
    content, calls = parse(tokenizer, as_engine(tokenizer, ids, held))
    assert (content.strip(), calls) == (text.strip(), TWO)
    assert parse(tokenizer, whole(tokenizer, ids)) == (content, calls)


def test_the_marker_written_as_text_is_text(tokenizer: mixtral.Tokenizer) -> None:
    ids = tokenizer.encode("[TOOL_CALLS]" + ONE)
    assert tool_calls_id(tokenizer) not in ids
    content, calls = parse(tokenizer, as_engine(tokenizer, ids))
    assert (content.strip(), calls) == ("[TOOL_CALLS]" + ONE, [])


@pytest.mark.parametrize("text", ["I cannot do that", '{"city": 1}', "[1]", "[", '[{"name": 1}]'])
def test_what_is_no_call_is_content(tokenizer: mixtral.Tokenizer, text: str) -> None:
    ids = tokenizer.encode("[TOOL_CALLS]" + text, parse_special=True)
    assert parse(tokenizer, as_engine(tokenizer, ids)) == (text, [])


def test_random_tokens_stream_as_they_are_read_whole(tokenizer: mixtral.Tokenizer) -> None:
    rng = random.Random(1)
    marker = tool_calls_id(tokenizer)
    known = tokenizer.encode('[{"name": "f", "arguments": {"a": "é", "b": 1}}] f{"x": []} [ARGS]')
    for _ in range(300):
        ids = [rng.choice([marker, *rng.choices(known, k=6), rng.randrange(tokenizer.vocab_size)])
               for _ in range(rng.randrange(1, 30))]  # fmt: skip
        streamed = parse(tokenizer, as_engine(tokenizer, ids, rng.randrange(4)))
        assert streamed == parse(tokenizer, whole(tokenizer, ids)), ids


def test_the_first_piece_has_the_name_and_the_others_arguments(tokenizer: mixtral.Tokenizer) -> None:
    parser = ToolParser(tokenizer)
    deltas = []
    for token in tokenizer.encode("[TOOL_CALLS]" + ONE, parse_special=True):
        deltas += [piece.delta() for piece in parser.push("", [token]).calls]
    first, *others = deltas
    assert first["type"] == "function" and len(first["id"]) == 9 and first["id"].isalnum()
    assert first["function"] == {"name": "get_weather", "arguments": ""}
    assert len(others) > 3 and all(delta.keys() == {"index", "function"} for delta in others)
    assert json.loads("".join(delta["function"]["arguments"] for delta in others)) == {"city": "Köln 日本"}


def test_ids_differ() -> None:
    assert len({new_call_id() for _ in range(1000)}) == 1000


def test_a_tokenizer_v1_has_no_marker() -> None:
    assert tool_calls_id(mixtral.Tokenizer(DATA / "tokenizer.model.v1")) is None
