"""Tools through OpenAI's client: what models are shown, and calls in answers, whole and as streams."""

import json
from contextlib import contextmanager
from pathlib import Path

import mistral_common
import openai
import pytest

import mixtral
from make_chat_vectors import FILES
from mixtral.server.app import create_app
from mixtral.server.bridge import Bridge
from mixtral.server.settings import Settings
from running import running, small_model

DATA = Path(mistral_common.__file__).parent / "data"
HI = [{"role": "user", "content": "How warm is it in Köln?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Köln", "Paris"]}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "now"}}
BOTH = [WEATHER, CLOCK]
CALLS = [("get_weather", '{"city": "Köln", "days": 2}'), ("now", "{}")]
SHAPES = {
    "json": '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Köln", "days": 2}}, '
    '{"name": "now", "arguments": {}, "id": "abcdefghi"}]',
    "marked": '[TOOL_CALLS]get_weather[ARGS]{"city": "Köln", "days": 2}[TOOL_CALLS]now[ARGS]{}',
    "bare": '[TOOL_CALLS]get_weather{"city": "Köln", "days": 2}[TOOL_CALLS]now{}',
}
RANDOM = {"model": "mixtral", "messages": HI, "temperature": 1.5, "max_tokens": 120}


class Script:
    """Makes a model say these tokens, and then end."""

    error = None

    def __init__(self, ids: list[int], end: int, vocab_size: int) -> None:
        self.left, self.vocab_size = [*ids, end], vocab_size

    def mask_behind(self, token_ids: list[int]) -> bytes:
        assert [self.left.pop(0) for _ in token_ids] == list(token_ids)
        return (1 << self.left[0]).to_bytes((self.vocab_size + 31) // 32 * 4, "little")


class Scripted:
    """A server whose model says ``says``, where that is set, and remembers its prompts."""

    def __init__(self, version: str) -> None:
        self.says: str | None = None
        self.prompts: list[list[int]] = []
        self.tokenizer = mixtral.Tokenizer(DATA / FILES[version])
        self.vocab_size = self.tokenizer.vocab_size + 8
        self.model = small_model(DATA / FILES[version], self.vocab_size)

    def make_bridge(self, *arguments) -> Bridge:
        scripted = self

        class ScriptedBridge(Bridge):
            def submit(self, seat, key, prompt, params, experts, routed, matcher=None):
                scripted.prompts.append(list(prompt))
                if scripted.says is not None and matcher is None:
                    ids = scripted.tokenizer.encode(scripted.says, parse_special=True)
                    matcher = Script(ids, scripted.tokenizer.eos_id, scripted.vocab_size)
                return super().submit(seat, key, prompt, params, experts, routed, matcher)

        return ScriptedBridge(*arguments)

    @contextmanager
    def client(self):
        with running(create_app(self.model, Settings(), bridge=self.make_bridge)) as url:
            with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
                yield client


@pytest.fixture(scope="module", params=["v2", "v3", "v7"])
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def shared(version: str):
    scripted = Scripted(version)
    with scripted.client() as client:
        yield scripted, client


@pytest.fixture
def scripted(shared) -> Scripted:
    shared[0].says = None
    shared[0].prompts.clear()
    return shared[0]


@pytest.fixture
def client(shared, scripted) -> openai.OpenAI:
    return shared[1]


def called(message) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in message.tool_calls or []]


def streamed(client: openai.OpenAI, **options):
    """(content, calls, finish reason) of a stream; the deltas of calls are checked on the way."""
    content, calls, ids, reason = "", [], [], None
    for chunk in client.chat.completions.create(stream=True, **options):
        choice = chunk.choices[0]
        assert reason is None
        reason = choice.finish_reason
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or []:
            if call.function.name is not None:
                assert (call.index, call.type) == (len(calls), "function")
                calls.append((call.function.name, ""))
                ids.append(call.id)
            assert call.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + call.function.arguments)
    assert len(set(ids)) == len(ids) and all(len(number) == 9 and number.isalnum() for number in ids)
    return content, calls, reason


@pytest.mark.parametrize("text", ["", "Let me look."])
@pytest.mark.parametrize("shape", SHAPES)
def test_calls_are_found_in_all_shapes(scripted, client, shape, text):
    scripted.says = text + SHAPES[shape]
    options = {**RANDOM, "tools": BOTH}
    choice = client.chat.completions.create(**options).choices[0]
    assert choice.finish_reason == "tool_calls" and called(choice.message) == CALLS
    assert choice.message.content == (text or None)
    assert streamed(client, **options) == (text, CALLS, "tool_calls")
    assert client.chat.completions.create(logprobs=True, **options).choices[0].logprobs.content[-1].logprob < 0


def test_the_prompt_shows_tools_calls_and_results(scripted, client, version):
    scripted.says = SHAPES["json"].split(", {")[0] + "]"
    answer = client.chat.completions.create(**RANDOM, tools=BOTH)
    assert scripted.prompts[-1] == scripted.tokenizer.apply_chat(HI, tools=BOTH)
    # As in OpenAI's guides: the message goes back as it came, and the result behind it.
    message = answer.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": '{"celsius": 21}'}
    scripted.says = "It is warm."
    options = {**RANDOM, "messages": [*HI, message, result], "tools": BOTH}
    choice = client.chat.completions.create(**options).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == ("It is warm.", None, "stop")
    call = {"id": message.tool_calls[0].id, "type": "function",
            "function": {"name": CALLS[0][0], "arguments": CALLS[0][1]}}  # fmt: skip
    history = [*HI, {"role": "assistant", "content": "", "tool_calls": [call]}, result]
    assert scripted.prompts[-1] == scripted.tokenizer.apply_chat(history, tools=BOTH)


def test_tools_are_not_shown_when_none_may_be_called(scripted, client):
    scripted.says = "[TOOL_CALLS][{}]"
    choice = client.chat.completions.create(**RANDOM, tools=BOTH, tool_choice="none").choices[0]
    assert scripted.prompts[-1] == scripted.tokenizer.apply_chat(HI)
    assert (choice.message.content, choice.message.tool_calls) == ("[{}]", None)


def test_text_that_is_no_call_is_content(scripted, client):
    scripted.says = "Hm.[TOOL_CALLS] I call get_weather"
    options = {**RANDOM, "tools": BOTH}
    choice = client.chat.completions.create(**options).choices[0]
    assert (choice.message.tool_calls, choice.finish_reason) == (None, "stop")
    assert choice.message.content == "Hm.I call get_weather"
    assert streamed(client, **options) == (choice.message.content, [], "stop")


def test_a_call_that_is_cut_says_so(scripted, client):
    scripted.says = SHAPES["json"]
    options = {**RANDOM, "tools": BOTH, "max_tokens": 16}
    choice = client.chat.completions.create(**options).choices[0]
    ((name, arguments),) = called(choice.message)
    assert choice.finish_reason == "length" and name == "get_weather" and CALLS[0][1].startswith(arguments)
    assert streamed(client, **options) == ("", [(name, arguments)], "length")


def check_arguments(calls: list[tuple[str, str]]) -> None:
    for name, arguments in calls:
        given = json.loads(arguments)
        if name == "now":
            assert given == {}
        else:
            assert given["city"] in ("Köln", "Paris") and 1 <= given["days"] <= 9 and len(given) == 2


@pytest.mark.parametrize("seed", range(4))
def test_a_required_call_comes_from_any_model(client, seed):
    options = {**RANDOM, "seed": seed, "tools": BOTH, "tool_choice": "required", "parallel_tool_calls": False}
    choice = client.chat.completions.create(**options).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert len(called(choice.message)) == 1
    check_arguments(called(choice.message))
    assert streamed(client, **options) == ("", called(choice.message), "tool_calls")


def test_several_required_calls(client):
    options = {**RANDOM, "tools": BOTH, "tool_choice": "required", "max_tokens": 700}
    numbers = set()
    for seed in range(6):
        choice = client.chat.completions.create(seed=seed, **options).choices[0]
        assert 1 <= len(called(choice.message)) <= 16 and choice.finish_reason == "tool_calls"
        check_arguments(called(choice.message))
        numbers.add(len(called(choice.message)))
    assert max(numbers) > 1


def test_a_named_function_is_called(client):
    for seed in range(4):
        named = {"type": "function", "function": {"name": "get_weather"}}
        options = {**RANDOM, "seed": seed, "tools": BOTH, "tool_choice": named, "parallel_tool_calls": False}
        ((name, arguments),) = called(client.chat.completions.create(**options).choices[0].message)
        assert name == "get_weather"
        check_arguments([(name, arguments)])


def test_a_strict_function_keeps_to_its_schema_and_text_stays_free(scripted, client):
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    options = {**RANDOM, "tools": [strict], "parallel_tool_calls": False}
    choice = client.chat.completions.create(**{**options, "max_tokens": 8}).choices[0]
    assert choice.message.content and choice.finish_reason == "length"  # random weights say no [TOOL_CALLS]
    (marker,) = scripted.tokenizer.special_in("[TOOL_CALLS]")
    for seed in range(3):
        choice = client.chat.completions.create(seed=seed, logit_bias={str(marker): 40}, **options).choices[0]
        check_arguments(called(choice.message))
        assert len(called(choice.message)) == 1 and choice.finish_reason == "tool_calls"


def test_an_answer_is_json_or_a_call(scripted, client):
    options = {**RANDOM, "tools": BOTH, "response_format": {"type": "json_object"}, "max_tokens": 60}
    choice = client.chat.completions.create(seed=1, **options).choices[0]
    assert choice.message.content.startswith("{")
    (marker,) = scripted.tokenizer.special_in("[TOOL_CALLS]")
    choice = client.chat.completions.create(seed=1, logit_bias={str(marker): 40}, **options).choices[0]
    assert choice.message.content is None and called(choice.message)


@pytest.mark.parametrize(
    "options, param",
    [
        ({"tools": [{"type": "retrieval"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools"),
        ({"tools": [CLOCK, CLOCK]}, "tools"),
        ({"tools": [CLOCK], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": "required", "extra_body": {"min_tokens": 2}}, "min_tokens"),
        ({"messages": [*HI, {"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [*HI, {"role": "tool", "tool_call_id": "abcdefghi", "content": "x"}]}, "messages"),
        ({"messages": [*HI, {"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": []}]}, "messages"),
    ],
)
def test_what_is_wrong_is_named(client, options, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**{**RANDOM, **options})
    assert error.value.param == param


def test_a_schema_that_cannot_be_enforced_is_refused_where_it_would_be(scripted, client):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {}}}}
    with pytest.raises(openai.BadRequestError, match="Unimplemented keys") as error:
        client.chat.completions.create(**RANDOM, tools=[tool], tool_choice="required")
    assert error.value.param == "tools"
    scripted.says = "Hi"
    assert client.chat.completions.create(**RANDOM, tools=[tool]).choices[0].message.content == "Hi"


def test_models_tell_how_they_take_tools(client, version):
    assert client.models.retrieve("mixtral").model_extra["tool_format"] == f"mistral-{version}"


def test_a_model_with_tokenizer_v1_takes_no_tools():
    with Scripted("v1").client() as client:
        assert client.models.retrieve("mixtral").model_extra["tool_format"] is None
        for choice in ("auto", "required"):
            with pytest.raises(openai.BadRequestError, match="this model takes none") as error:
                client.chat.completions.create(**RANDOM, tools=BOTH, tool_choice=choice)
            assert error.value.param == "tools"
        call = {"id": "abcdefghi", "type": "function", "function": {"name": "now", "arguments": "{}"}}
        history = [*HI, {"role": "assistant", "tool_calls": [call]},
                   {"role": "tool", "tool_call_id": "abcdefghi", "content": "x"}]  # fmt: skip
        with pytest.raises(openai.BadRequestError, match="tokenizer v1 has no tool calls"):
            client.chat.completions.create(**{**RANDOM, "messages": history})
        options = {**RANDOM, "tools": BOTH, "tool_choice": "none", "max_tokens": 2}
        assert client.chat.completions.create(**options).choices[0].finish_reason
