"""Answers that are JSON, or JSON of a schema, whatever the model would rather say."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import openai
import pydantic
import pytest

from mixtral.server import grammar
from mixtral.server.errors import ApiError
from running import served, small_model
from schema_campaign import campaign, check

pytest_plugins = ["server_fixtures"]

HI = [{"role": "user", "content": "Hi"}]
CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "coast": {"type": "boolean"},
    },
    "required": ["name", "size", "coast"],
    "additionalProperties": False,
}
RANDOM = {"model": "mixtral", "messages": HI, "temperature": 1.5, "seed": 3}


def form(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


@pytest.fixture
def client(server_url):
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_answers_to_random_schemas_are_valid(server_url):
    ends = asyncio.run(campaign(server_url, count=100, seed=2))
    assert ends.keys() <= {"valid", "cut"}, ends
    assert ends["valid"] > 60 and ends.total() == 100


def test_an_answer_of_a_schema_streams_and_has_logprobs(client):
    options = {**RANDOM, "max_tokens": 120, "response_format": form(CITY), "logprobs": True, "top_logprobs": 2, "n": 2}
    whole = client.chat.completions.create(**options)
    texts = ["", ""]
    for chunk in client.chat.completions.create(stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    for choice, text in zip(whole.choices, texts, strict=True):
        assert choice.finish_reason == "stop" and choice.message.content == text
        check(text, CITY)
        tokens = choice.logprobs.content
        assert b"".join(bytes(token.bytes) for token in tokens).decode().strip() == text.strip()
        # Of the model's own distribution: random weights would seldom pick these tokens.
        assert all(token.logprob <= token.top_logprobs[0].logprob <= 0 for token in tokens)
        assert min(token.logprob for token in tokens) < -4
    assert texts[0] != texts[1]


def test_json_object_is_an_object(client):
    for seed in range(10):
        options = {**RANDOM, "seed": seed, "temperature": 0.3, "max_tokens": 80}
        choice = client.chat.completions.create(response_format={"type": "json_object"}, **options).choices[0]
        assert choice.message.content.startswith("{")
        assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


def test_text_is_what_it_is_without_a_format(client):
    plain = client.chat.completions.create(**RANDOM, max_tokens=8).choices[0].message.content
    options = {**RANDOM, "max_tokens": 8, "response_format": {"type": "text"}}
    assert client.chat.completions.create(**options).choices[0].message.content == plain


def test_pydantic_models_parse(client):
    class City(pydantic.BaseModel):
        name: Annotated[str, pydantic.Field(max_length=8)]
        coast: bool

    completion = client.chat.completions.parse(**{**RANDOM, "seed": 1}, max_tokens=200, response_format=City)
    assert isinstance(completion.choices[0].message.parsed, City)


def test_a_space_before_the_json_is_allowed(server_model):
    """Mistral's models begin their answers with one, and it is part of the token."""
    tokenizer = server_model.tokenizer
    grammars = grammar.Grammars(tokenizer, server_model.config.vocab_size, [tokenizer.eos_id])
    mask = grammars.matcher(grammar.answer_grammar({"type": "object"}), "response_format").mask_behind([])
    allowed = {token for token in range(tokenizer.vocab_size) if mask[token // 8] >> token % 8 & 1}
    pieces = {tokenizer.piece(token) for token in allowed}
    space = "\u2581"
    assert tokenizer.encode("{")[0] in allowed, pieces
    assert space in pieces and pieces <= {
        start + text for start in ("", space) for text in ("", "{", '{"', "{}", "<0x20>", "<0x7B>", '{"name')
    }, pieces


def test_other_requests_do_not_wait_for_a_mask(monkeypatch):
    """A request whose mask never comes neither stops the others nor outlives its client."""
    monkeypatch.setattr(grammar.MaskThread, "push", lambda self, due: None)
    with served(small_model()) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with ThreadPoolExecutor(1) as pool:
            options = {**RANDOM, "max_tokens": 5}
            waits = pool.submit(
                client.chat.completions.create, **options, response_format={"type": "json_object"}, timeout=6
            )
            for _ in range(3):
                assert client.chat.completions.create(**options, timeout=60).choices[0].finish_reason
            assert not waits.done()
            with pytest.raises(openai.APITimeoutError):
                waits.result(timeout=60)
        assert client.chat.completions.create(**options, timeout=60).choices[0].finish_reason


def test_a_grammar_that_breaks_on_the_way_is_an_error(monkeypatch):
    class Panics:
        def __init__(self, matcher):
            self.matcher = matcher

        def __getattr__(self, name):
            return getattr(self.matcher, name)

        def consume_token(self, token):
            raise BaseException("a panic")

    sound = grammar.Matcher.__init__
    monkeypatch.setattr(grammar.Matcher, "__init__", lambda self, matcher, size: sound(self, Panics(matcher), size))
    with served(small_model()) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="failed at this grammar"):
            client.chat.completions.create(**RANDOM, max_tokens=5, response_format={"type": "json_object"}, timeout=60)
        assert client.chat.completions.create(**RANDOM, max_tokens=5, timeout=60).choices[0].finish_reason


def deep(levels: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "schema, words",
    [
        ({"type": "strin"}, "Invalid type: strin"),
        ({"not": {"type": "string"}}, 'Unimplemented keys: \\["not"\\]'),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"oneOf": [{"type": "object"}, {"properties": {}}]}, "oneOf needs alternatives that exclude each other"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "https://example.org/schema.json"}, "not present"),
        ({"$ref": "#/$defs/none"}, "does not exist"),
        ({"$ref": "#"}, "nothing fits it"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "nsatisfiable"),
        (deep(48), "may be nested 48 deep"),
        ({"enum": ["x" * 100_000]}, "may have 64 KiB"),
        # Bombs: an intersection that takes minutes to compile, a regular expression with millions of states, and
        # alternatives that are all open at once.
        ({"allOf": [{"pattern": f".*(a{{{n}}}|b.{{{n}}})", "type": "string"} for n in range(20, 40)]}, "too complex"),
        ({"anyOf": [{"type": "object", "properties": {f"p{n}": {}}} for n in range(800)]}, "too complex"),
    ],
)  # fmt: skip
def test_a_bad_schema_is_refused(client, schema, words):
    with pytest.raises(openai.BadRequestError, match=words) as error:
        client.chat.completions.create(**RANDOM, max_tokens=4, response_format=form(schema))
    assert error.value.param == "response_format"


def test_a_regex_bomb_ends_one_request_alone(client):
    bomb = {"type": "string", "pattern": "^(a|b|[^c]){1000}{1000}(.*a){25}.{400}(x|y)$"}
    try:
        options = {**RANDOM, "max_tokens": 60, "temperature": 1.0}
        assert client.chat.completions.create(response_format=form(bomb), **options).choices[0].finish_reason
    except openai.BadRequestError as error:
        assert "too complex" in error.message
    assert client.chat.completions.create(**RANDOM, max_tokens=4).choices[0].finish_reason


@pytest.mark.parametrize(
    "options, param",
    [
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_object", "json_schema": {"name": "a"}}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "extra_body": {"ignore_eos": True}}, "ignore_eos"),
        ({"response_format": {"type": "json_object"}, "extra_body": {"min_tokens": 3}}, "min_tokens"),
    ],
)
def test_what_does_not_go_together_is_named(client, options, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**RANDOM, max_tokens=4, **options)
    assert error.value.param == param


def test_an_answer_that_is_begun_has_no_format(client):
    messages = [*HI, {"role": "assistant", "content": '{"a":'}]
    with pytest.raises(openai.BadRequestError, match="an answer that is begun"):
        client.chat.completions.create(
            model="mixtral", messages=messages, max_tokens=4, response_format={"type": "json_object"}
        )


def test_depth_is_measured_without_recursion():
    grammar.answer_grammar(deep(47))
    with pytest.raises(ApiError, match="48 deep"):
        grammar.answer_grammar(deep(100_000))
