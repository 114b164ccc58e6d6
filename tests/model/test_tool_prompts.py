"""Prompts with tools, tool calls and their results are mistral-common's, id by id, on its own vocabularies."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import FunctionCall, Tool, ToolCall
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

import mixtral
from make_chat_vectors import FILES

DATA = Path(mistral_common.__file__).parent / "data"

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'The weather of a "city", é日',
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1.50}},
            "required": ["city"],
        },
        "strict": True,
    },
}
CLOCK = {"type": "function", "function": {"name": "now"}}
CALL = {"id": "abcDEF123", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Köln"}'}}
OTHER_CALL = {"id": "zzzzzzzz9", "type": "function", "function": {"name": "now", "arguments": ""}}
RESULT = {"role": "tool", "tool_call_id": "abcDEF123", "name": "get_weather", "content": '{"t": 1e5, "s":"[INST]"}'}
OTHER_RESULT = {"role": "tool", "tool_call_id": "zzzzzzzz9", "name": "now", "content": "ten o'clock"}
USER = {"role": "user", "content": "How warm is it?"}


@pytest.fixture(scope="module", params=["v2", "v3", "v7"])
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(version: str) -> mixtral.Tokenizer:
    return mixtral.Tokenizer(DATA / FILES[version])


@pytest.fixture(scope="module")
def oracle(version: str) -> MistralTokenizer:
    return MistralTokenizer.from_file(str(DATA / FILES[version]), mode=ValidationMode.serving)


def to_message(message: dict[str, Any]) -> UserMessage | SystemMessage | AssistantMessage | ToolMessage:
    fields = {key: value for key, value in message.items() if key != "role"}
    if message["role"] == "assistant" and "tool_calls" in fields:
        fields["tool_calls"] = [
            ToolCall(id=call["id"], function=FunctionCall(**call["function"])) for call in fields["tool_calls"]
        ]
    kinds = {"user": UserMessage, "system": SystemMessage, "assistant": AssistantMessage, "tool": ToolMessage}
    return kinds[message["role"]](**fields)


def oracle_ids(oracle: MistralTokenizer, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[int]:
    request = ChatCompletionRequest(
        messages=[to_message(m) for m in messages], tools=[Tool.from_openai(t) for t in tools] or None, model="m"
    )
    return oracle.encode_chat_completion(request).tokens


def calls(*calls: dict[str, Any], content: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


CONVERSATIONS = {
    "a question": [USER],
    "with a system prompt": [{"role": "system", "content": "Be brief."}, USER],
    "a result": [USER, calls(CALL), RESULT],
    "a result and a question": [USER, calls(CALL), RESULT, {"role": "assistant", "content": "Warm. "}, USER],
    "no answer to the result": [USER, calls(CALL), RESULT, USER],
    "two rounds": [USER, calls(CALL), RESULT, calls(OTHER_CALL), OTHER_RESULT],
    "an answer to go on with": [USER, calls(CALL), RESULT, {"role": "assistant", "content": "It is", "prefix": True}],
    "calls again": [USER, calls(CALL), RESULT, {"role": "assistant", "content": "a"}, USER, calls(CALL), RESULT],
}


@pytest.mark.parametrize("tools", [[], [WEATHER], [CLOCK, WEATHER]], ids=["no tools", "a tool", "two tools"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_have_the_ids_of_mistral_common(
    name: str, tools: list[dict[str, Any]], tokenizer: mixtral.Tokenizer, oracle: MistralTokenizer
) -> None:
    messages = CONVERSATIONS[name]
    assert tokenizer.apply_chat(messages, tools=tools) == oracle_ids(oracle, messages, tools)


def test_several_calls_in_one_answer(version: str, tokenizer: mixtral.Tokenizer, oracle: MistralTokenizer) -> None:
    messages = [USER, calls(CALL, OTHER_CALL), RESULT, OTHER_RESULT]
    if version == "v2":
        with pytest.raises(ValueError, match="v2 takes the result of one tool call"):
            tokenizer.apply_chat(messages, tools=[WEATHER])
        messages.append(USER)  # and then they are not shown
    assert tokenizer.apply_chat(messages, tools=[WEATHER]) == oracle_ids(oracle, messages, [WEATHER])


def test_text_beside_calls_is_for_v7(version: str, tokenizer: mixtral.Tokenizer, oracle: MistralTokenizer) -> None:
    for messages in (
        [USER, calls(CALL, content="Let me look. "), RESULT],
        [USER, {"role": "assistant", "content": "Let me look."}, calls(CALL), RESULT],
    ):
        if version == "v7":
            assert tokenizer.apply_chat(messages) == oracle_ids(oracle, messages, [])
        else:
            with pytest.raises(ValueError, match=f"an answer has text or tool calls with tokenizer {version}"):
                tokenizer.apply_chat(messages)


def random_conversation(rng: random.Random) -> list[dict[str, Any]]:
    texts = ["", "Hi", " two ", "[TOOL_CALLS] [{}]", "é日", '{"a": [1, 2.50, null, "x"]}', "nul", "-0", "1e400", '"q"']
    messages: list[dict[str, Any]] = []
    for place in range(rng.randrange(1, 6)):
        # mistral-common does not count the calls and results of a first message.
        kind = rng.choice(["user", "user", "assistant", "system"] + ["calls", "calls", "tool"] * (place > 0))
        if kind == "calls":
            ids = ["abcDEF123"] if rng.random() < 0.8 else ["abcDEF123", "zzzzzzzz9", "bad"]
            made = [dict(call, id=rng.choice(ids))
                    for call in rng.choices([CALL, OTHER_CALL], k=rng.choice([1, 1, 2]))]  # fmt: skip
            for call in made:
                arguments = rng.choice([*texts, '{"city": "x"}', "{}"])
                call["function"] = {"name": rng.choice(["f", "get_weather"]), "arguments": arguments}
            messages.append(calls(*made, content=rng.choice(["", None, None, "text"])))
            if rng.random() < 0.8:
                messages += [dict(RESULT, content=rng.choice(texts)) for _ in made]
        elif kind == "tool":
            messages.append(dict(RESULT, content=rng.choice(texts)))
        else:
            messages.append({"role": kind, "content": rng.choice(texts)})
    if rng.random() < 0.6:
        messages.append(USER)
    return messages


def test_random_conversations_agree_with_mistral_common(tokenizer: mixtral.Tokenizer, oracle: MistralTokenizer) -> None:
    rng = random.Random(1)
    agreed = refused = 0
    for _ in range(1500):
        messages = random_conversation(rng)
        tools = rng.choice([[], [WEATHER], [CLOCK, WEATHER]])
        # Refused one by one here; mistral-common joins neighbours first.
        stricter = any(m["role"] == "assistant" and not m["content"] and "tool_calls" not in m for m in messages)
        try:
            ids = oracle_ids(oracle, messages, tools)
        except (MistralCommonException, ValueError):
            ids = None
        if ids is None or stricter:
            refused += 1
            with pytest.raises(ValueError, match="chat: "):
                tokenizer.apply_chat(messages, tools=tools)
        else:
            agreed += 1
            assert tokenizer.apply_chat(messages, tools=tools) == ids, messages
    assert agreed > 200 and refused > 200


def test_v2_names_the_function_of_a_result_that_only_has_an_id() -> None:
    tokenizer = mixtral.Tokenizer(DATA / FILES["v2"])
    unnamed = {key: value for key, value in RESULT.items() if key != "name"}
    assert tokenizer.apply_chat([USER, calls(CALL), unnamed]) == tokenizer.apply_chat([USER, calls(CALL), RESULT])


@pytest.mark.parametrize(
    ("messages", "tools", "words"),
    [
        ([USER, calls(CALL)], [], "last role must be user"),
        ([USER, calls(CALL), USER], [], "message 1: has 1 tool calls without a result"),
        ([USER, RESULT], [], "message 1: role before tool"),
        ([RESULT], [], "message 0: role before tool"),
        ([USER, calls(CALL), RESULT, RESULT], [], "message 3: a tool's message must be the result of a call"),
        ([USER, calls(dict(CALL, id="call_1")), RESULT], [], "message 1: the id of a tool call has 9"),
        ([USER, calls(CALL), dict(RESULT, tool_call_id="x")], [], "message 2: the id of a tool call has 9"),
        ([USER, calls({"id": "abcDEF123"}), RESULT], [], "message 1: a tool call must be"),
        ([USER], [{"type": "function", "function": {"name": "a b"}}], r"tools\[0\]: the name of a function"),
        ([USER], [WEATHER, {"type": "retrieval"}], r"tools\[1\] must be"),
        ([USER], [{"type": "function", "function": {"name": "f", "parameters": [1]}}], r"tools\[0\]: parameters"),
    ],
)
def test_what_is_wrong_is_named(messages: list[dict], tools: list[dict], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mixtral.Tokenizer(DATA / FILES["v3"]).apply_chat(messages, tools=tools)


@pytest.mark.parametrize(("messages", "tools"), [([USER], [WEATHER]), ([USER, calls(CALL), RESULT], [])])
def test_v1_has_no_tools(messages: list[dict], tools: list[dict]) -> None:
    with pytest.raises(ValueError, match="tokenizer v1 has no tool calls"):
        mixtral.Tokenizer(DATA / FILES["v1"]).apply_chat(messages, tools=tools)


def test_json_nested_too_deeply_is_text_or_refused() -> None:
    tokenizer = mixtral.Tokenizer(DATA / FILES["v3"])
    deep = "[" * 100_000 + "]" * 100_000
    shown = tokenizer.decode(tokenizer.apply_chat([USER, calls(CALL), dict(RESULT, content=deep)]))
    assert json.dumps(deep) in shown
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"items": schema}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    with pytest.raises(ValueError, match="nested too deeply"):
        tokenizer.apply_chat([USER], tools=[tool])


def test_a_template_gets_the_tools(tmp_path: Path) -> None:
    tokenizer = mixtral.Tokenizer(DATA / FILES["v3"])
    template = "{% for tool in tools %}{{ tool.function.name }},{% endfor %}{{ messages[0].content }}"
    ids = tokenizer.apply_chat([USER], template, tools=[WEATHER, CLOCK])
    assert tokenizer.decode(ids) == "get_weather,now,How warm is it?"
