"""What the official client of OpenAI gets from the server."""

import asyncio
import time

import openai
import pytest

pytest_plugins = ["server_fixtures"]

HI = [{"role": "user", "content": "Say something about the sea."}]
FIXED = {"model": "mixtral", "max_tokens": 12, "temperature": 0.9, "seed": 7, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def client(server_url):
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_a_completion_has_the_fields_of_openai(client):
    answer = client.completions.create(prompt="In the beginning", **FIXED)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-") and answer.model == "mixtral"
    assert abs(answer.created - time.time()) < 60
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert choice.text
    usage = answer.usage
    assert (usage.completion_tokens, usage.total_tokens) == (12, usage.prompt_tokens + 12)
    assert usage.prompt_tokens_details.cached_tokens >= 0


def test_a_chat_completion_has_the_fields_of_openai(client, server_model):
    answer = client.chat.completions.create(messages=HI, **FIXED)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert (choice.message.role, choice.message.refusal, choice.message.tool_calls) == ("assistant", None, None)
    assert choice.message.content
    assert answer.usage.prompt_tokens == len(server_model.tokenizer.apply_chat(HI))


def test_a_streamed_completion_is_the_whole_one(client):
    whole = client.completions.create(prompt="In the beginning", logprobs=2, **FIXED)
    chunks = list(client.completions.create(prompt="In the beginning", logprobs=2, stream=True, **FIXED))
    assert len({chunk.id for chunk in chunks}) == len({chunk.created for chunk in chunks}) == 1
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        streamed = [item for chunk in chunks for item in getattr(chunk.choices[0].logprobs, field)]
        assert streamed == getattr(whole.choices[0].logprobs, field), field


def test_a_streamed_chat_is_the_whole_one(client):
    options = {"messages": HI, "logprobs": True, "top_logprobs": 3, **FIXED}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options))
    *chunks, last = chunks
    assert last.choices == [] and last.usage == whole.usage
    assert all(chunk.usage is None and chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    streamed = [item for chunk in chunks if chunk.choices[0].logprobs for item in chunk.choices[0].logprobs.content]
    assert streamed == whole.choices[0].logprobs.content


def test_the_logprobs_of_a_completion_are_those_of_the_model(client, server_model):
    choice = client.completions.create(prompt="In the beginning", logprobs=2, **FIXED).choices[0]
    expected = server_model.generate("In the beginning", 12, temperature=0.9, seed=7, logprobs=2, ignore_eos=True)[0]
    assert choice.text == expected.text
    assert choice.logprobs.token_logprobs == [token.logprob for token in expected.logprobs]
    for top, token, text in zip(choice.logprobs.top_logprobs, expected.logprobs, choice.logprobs.tokens, strict=True):
        assert top[text] == token.logprob
        assert 2 <= len(top) <= 3 and sorted(top.values(), reverse=True)[0] == token.top[0][1]
    ends = [*choice.logprobs.text_offset[1:], len(choice.text)]
    for begin, end, text in zip(choice.logprobs.text_offset, ends, choice.logprobs.tokens, strict=True):
        assert choice.text[begin:end] == text or text.startswith("bytes:")


def test_zero_logprobs_are_of_the_token_alone(client):
    choice = client.completions.create(prompt="In the beginning", logprobs=0, **FIXED).choices[0]
    assert len(choice.logprobs.token_logprobs) == 12 and choice.logprobs.top_logprobs == [None] * 12
    chat = client.chat.completions.create(messages=HI, logprobs=True, **FIXED).choices[0]
    assert [token.top_logprobs for token in chat.logprobs.content] == [[]] * 12


def test_the_bytes_of_tokens_are_the_text(client):
    choice = client.chat.completions.create(messages=HI, logprobs=True, top_logprobs=1, **FIXED).choices[0]
    text = b"".join(bytes(token.bytes) for token in choice.logprobs.content).decode(errors="replace")
    assert text.removeprefix(" ") == choice.message.content


def test_n_choices_are_seeded_one_by_one(client):
    answer = client.completions.create(prompt=["One", "Two"], n=3, **FIXED)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert len({choice.text for choice in answer.choices}) > 3
    again = client.completions.create(prompt=["One", "Two"], n=3, **FIXED)
    assert [choice.text for choice in again.choices] == [choice.text for choice in answer.choices]
    alone = client.completions.create(prompt="Two", n=1, **FIXED)
    assert alone.choices[0].text == answer.choices[3].text
    assert answer.usage.completion_tokens == 6 * 12
    chunks = client.completions.create(prompt=["One", "Two"], n=3, stream=True, **FIXED)
    texts = [""] * 6
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in answer.choices]


def test_prompts_may_be_token_ids(client, server_model):
    ids = server_model.tokenizer.encode("In the beginning", add_bos=True)
    texts = client.completions.create(prompt="In the beginning", **FIXED).choices
    assert client.completions.create(prompt=ids, **FIXED).choices == texts
    assert client.completions.create(prompt=[ids], **FIXED).choices == texts


def test_stop_strings_end_an_answer(client):
    options = {**FIXED, "temperature": 0}
    text = client.completions.create(prompt="In the beginning", **options).choices[0].text
    stop = text[len(text) // 2 :][:3]
    choice = client.completions.create(prompt="In the beginning", stop=["never", stop], **options).choices[0]
    assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")
    chunks = client.completions.create(prompt="In the beginning", stop=stop, stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.index(stop)]


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["mixtral"]
    assert client.models.retrieve("mixtral").owned_by == "mixtral"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize(
    "options, param",
    [
        ({"prompt": "a", "temperature": 3}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "n": 9}, "n"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "stop": [""]}, "stop"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [4096]}, "prompt"),
        ({"prompt": "a", "max_tokens": 2000}, "prompt"),
        ({"prompt": "a", "extra_body": {"no_such_field": 1}}, "no_such_field"),
        ({"prompt": "a", "extra_body": {"experts_per_token": 5}}, "experts_per_token"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_a_bad_parameter_is_named(client, options, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(**{"model": "mixtral", **options})
    assert error.value.param == param
    assert error.value.type == "invalid_request_error" and param in error.value.message


@pytest.mark.parametrize(
    "options, param",
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [*HI, *HI, {"role": "system", "content": "late"}]}, "messages"),
        ({"messages": HI, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": HI, "modalities": ["audio"]}, "modalities"),
        ({"messages": HI, "reasoning_effort": "low"}, "reasoning_effort"),
        ({"messages": HI, "extra_body": {"chat_template": "{{ messages }}"}}, "chat_template"),
    ],
)
def test_a_bad_parameter_of_a_chat_is_named(client, options, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="mixtral", max_tokens=4, **options)
    assert error.value.param == param


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="gpt-4", prompt="a")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")


def test_many_async_clients_get_what_one_gets(server_url, client):
    prompts = [f"Prompt number {i}" for i in range(24)]
    alone = [client.completions.create(prompt=prompt, **FIXED).choices[0].text for prompt in prompts]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as many:

            async def one(i: int, prompt: str) -> str:
                if i % 2:
                    return (await many.completions.create(prompt=prompt, **FIXED)).choices[0].text
                stream = await many.completions.create(prompt=prompt, stream=True, **FIXED)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts)))

    assert asyncio.run(asyncio.wait_for(together(), 120)) == alone
