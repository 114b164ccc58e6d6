"""What a request may hold: a wrong value is 400 that names the field, and never harms the server."""

import json

import pytest

from generated_bodies import CANARY, bodies
from processes import Answer, ServerProcess

pytest_plugins = ["operations_fixtures"]

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
VALID = {
    COMPLETIONS: {"prompt": [5, 6, 7], "max_tokens": 1, "temperature": 0},
    CHAT: {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "temperature": 0},
}


def number(least: float, most: float, *, open_below: bool = False, step: float = 1e-6) -> dict[str, list]:
    """Values at the bounds, and beyond them."""
    fine, wrong = [most, (least + most) / 2], [most + step, least - step]
    (wrong if open_below else fine).append(least)
    return {"fine": fine, "wrong": [*wrong, "1", [], {}, True]}


FIELDS = {
    "temperature": {"fine": [0, 5e-324, 1e-30, 1, 2], "wrong": [2.1, -1e-9, "1", [], True]},
    "top_p": number(0, 1, open_below=True),
    "min_p": number(0, 1),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "repetition_penalty": {"fine": [0.01, 1, 100], "wrong": [0, 1e-9, 101, -1, "1", []]},
    "top_k": {"fine": [-1, 0, 1, 10**6], "wrong": [-2, 1.5, "1", [1], 2**70]},
    "n": {"fine": [1, 8], "wrong": [0, 9, -1, 1.5, "1", [], 2**70]},
    "max_tokens": {"fine": [1, 16], "wrong": [0, -1, 1.5, "1", [], 2**70]},
    "min_tokens": {"fine": [0, 1], "wrong": [-1, 1.5, "1", 2**70]},
    "seed": {"fine": [0, -1, 2**63 - 1, -(2**63)], "wrong": [2**63, -(2**63) - 1, 1.5, "1", []]},
    "stop": {
        "fine": ["a", ["a", "b"], [], "a" * 256],
        "wrong": ["", [""], 1, [1], {}, ["a"] * 9, "a" * 257, [["a"]]],
    },
    "stop_token_ids": {"fine": [[], [5]], "wrong": [[-1], [4096], ["5"], 5, [1.5], [2**70], [5] * 65]},
    "logit_bias": {
        "fine": [{}, {"5": 1}, {"5": -100, "6": 100}],
        "wrong": [{"5": 101}, {"5": "1"}, {"a": 1}, {"-1": 1}, {"4096": 1}, {str(2**40): 1}, [], 1],
    },
    "experts_per_token": {"fine": [1, 4], "wrong": [0, -1, 5, 1.5, "1"]},
    "stream": {"fine": [False], "wrong": ["true", 1, []]},
    "ignore_eos": {"fine": [True, False], "wrong": ["true", 1]},
    "user": {"fine": ["me"], "wrong": [1, []]},
    "stream_options": {"fine": [], "wrong": [{"include_usage": True}, {"a": 1}, [], 1]},
    "model": {"fine": ["small"], "wrong": [1, []]},
}


def post(server: ServerProcess, path: str, **fields: object) -> Answer:
    return server.post(path, {**VALID[path], **fields})


def assert_refused(answer: Answer, param: str | None) -> None:
    assert answer.status == 400, answer.body
    assert (answer.error["param"] or "").split(".")[0] == (param or "")
    assert answer.error["message"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("name", FIELDS)
def test_values_of_a_field(small: ServerProcess, path: str, name: str) -> None:
    for value in [*FIELDS[name]["fine"], None]:
        answer = post(small, path, **{name: value})
        assert answer.status == 200, (value, answer.body)
    for value in FIELDS[name]["wrong"]:
        assert_refused(post(small, path, **{name: value}), name)


@pytest.mark.parametrize("text", [b"NaN", b"Infinity", b"-Infinity", b"1e309", b"-1e309"])
def test_numbers_that_are_none(small: ServerProcess, text: bytes) -> None:
    answer = small.send("POST", COMPLETIONS, b'{"prompt": "a", "temperature": %s}' % text)
    assert_refused(answer, None)
    assert answer.error["code"] == "invalid_json"


@pytest.mark.parametrize(
    "value", ["", [], [""], [[]], None, 1, {}, True, [1.5], [[1], "a"], ["a", 1], [-1], [4096], [2**70]]
)
def test_prompts_that_are_none(small: ServerProcess, value: object) -> None:
    assert_refused(post(small, COMPLETIONS, prompt=value), "prompt")


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        "Hi",
        [{}],
        [{"role": "user"}],
        [{"role": "robot", "content": "Hi"}],
        [{"role": "user", "content": 1}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://localhost/"}}]}],
        [{"role": "user", "content": "Hi", "colour": "red"}],
        [{"role": "user", "content": "Hi"}, {"role": "user", "content": "Hi"}, {"role": "system", "content": "a"}],
    ],
)
def test_messages_that_are_none(small: ServerProcess, messages: object) -> None:
    assert_refused(post(small, CHAT, messages=messages), "messages")


def test_a_prompt_beyond_the_context_names_both_numbers(small: ServerProcess) -> None:
    answer = post(small, COMPLETIONS, prompt=[5] * 1020, max_tokens=5)
    assert answer.status == 400
    assert "1024" in answer.error["message"]
    assert "1020" in answer.error["message"] or "1025" in answer.error["message"]
    assert post(small, COMPLETIONS, prompt=[5] * 1020, max_tokens=4).status == 200


@pytest.mark.parametrize(
    "name", ["chat_template", "chat_template_kwargs", "best_off", "guided_regex", "image_url", "documents", "__class__"]
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_fields_that_do_not_exist(small: ServerProcess, path: str, name: str) -> None:
    assert_refused(post(small, path, **{name: "a"}), name)


def test_a_regular_expression_as_response_format(small: ServerProcess) -> None:
    answer = post(small, CHAT, response_format={"type": "regex", "pattern": "(a+)+b"})
    assert_refused(answer, "response_format")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"a"',
        b'{"prompt": "a", "prompt": "a"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": ' + b"[" * 65 + b"]" * 65 + b"}",
        b"[" * 10**6,
        b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}",
    ],
)
def test_bodies_that_are_no_request(small: ServerProcess, body: bytes) -> None:
    answer = small.send("POST", COMPLETIONS, body)
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"


def test_a_model_that_is_not_there(small: ServerProcess) -> None:
    answer = post(small, COMPLETIONS, model="another")
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")


def test_errors_show_no_address_and_no_path(small: ServerProcess) -> None:
    for field, values in FIELDS.items():
        for value in values["wrong"]:
            text = post(small, COMPLETIONS, **{field: value}).body.decode()
            assert "0x" not in text and "/" not in text.replace("n/a", ""), text


def test_generated_bodies(small: ServerProcess) -> None:
    """No body is an error of the server's, and another request has the same answer before and after."""
    canary = small.post(*CANARY).json()["choices"]
    for i, (path, body) in enumerate(bodies(200, seed=0)):
        answer = small.send("POST", path, body)
        assert answer.status < 500, (path, body, answer.body)
        if i % 50 == 49:
            assert small.post(*CANARY).json()["choices"] == canary
    assert json.dumps(canary)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_the_schema_says_that_answers_may_be_streams(small: ServerProcess, path: str) -> None:
    schema = json.loads(small.get("/openapi.json").body)
    content = schema["paths"][path]["post"]["responses"]["200"]["content"]
    assert set(content) == {"application/json", "text/event-stream"}
