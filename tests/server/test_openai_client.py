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
    assert last.choices == [] and last.usage.prompt_tokens_details.cached_tokens >= 0
    counts = [(u.prompt_tokens, u.completion_tokens, u.total_tokens) for u in (last.usage, whole.usage)]
    assert counts[0] == counts[1]
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


def test_echo_gives_the_prompt_with_its_logprobs(client, server_model):
    text, options = "In the beginning 海", {"echo": True, "logprobs": 2, **FIXED, "max_tokens": 3}
    ids = server_model.tokenizer.encode(text, add_bos=True)
    expected = server_model.generate(ids, 3, temperature=0.9, seed=7, logprobs=2, prompt_logprobs=2, ignore_eos=True)[0]
    choice = client.completions.create(prompt=text, **options).choices[0]
    assert choice.text == text + expected.text
    scored = [token.logprob for token in [*expected.prompt_logprobs[1:], *expected.logprobs]]
    assert choice.logprobs.token_logprobs == [None, *scored] and len(scored) == len(ids) + 2
    assert choice.logprobs.top_logprobs[0] is None
    for top, own, token in list(
        zip(choice.logprobs.top_logprobs, [None, *scored], choice.logprobs.tokens, strict=True)
    )[1:]:
        assert top[token] == own or token.startswith("bytes:")
    begins = choice.logprobs.text_offset
    assert choice.logprobs.tokens[0] == "<s>" and begins[:2] == [0, 0] and begins[len(ids)] == len(text)
    chunks = list(client.completions.create(prompt=text, stream=True, **options))
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    assert sum((chunk.choices[0].logprobs.token_logprobs for chunk in chunks), []) == choice.logprobs.token_logprobs
    assert client.completions.create(prompt=text, echo=True, **FIXED).choices[0].text.startswith(text)
    again = client.completions.create(prompt=[ids, ids], **options).choices
    assert [each.logprobs for each in again] == [choice.logprobs] * 2


def test_a_scored_prompt_has_one_new_token_even_at_the_end_of_the_text(client, server_model):
    """lm-evaluation-harness takes the last entry away."""
    ids, end = [1, 300, 400], server_model.tokenizer.eos_id
    options = {"echo": True, "logprobs": 1, "max_tokens": 1, "logit_bias": {str(end): 100}}
    choice = client.completions.create(model="mixtral", prompt=ids, **options).choices[0]
    assert len(choice.logprobs.token_logprobs) == len(ids) + 1
    assert choice.logprobs.tokens[-1] == "</s>" and choice.text == server_model.tokenizer.decode(ids)


def test_the_likeliest_of_equals_is_greedy(client):
    """lm-evaluation-harness compares the same floats: a greedy token's own, and the largest of its place."""
    options = {**FIXED, "temperature": 0, "max_tokens": 8}
    answer = client.completions.create(prompt="In the beginning", logprobs=1, **options).choices[0]
    scored = client.completions.create(prompt=f"In the beginning{answer.text}", echo=True, logprobs=1, **options)
    for logprobs in (answer.logprobs, scored.choices[0].logprobs):
        pairs = zip(logprobs.token_logprobs[-8:], logprobs.top_logprobs[-8:], strict=True)
        assert all(own == max(top.values()) for own, top in pairs)


def test_biases_and_stop_ids_reach_the_sampler(client):
    options = {"model": "mixtral", "prompt": "Once", "max_tokens": 5, "seed": 1}
    biased = client.completions.create(**options, logit_bias={"400": 100}, extra_body={"return_token_ids": True})
    assert biased.choices[0].token_ids == [400] * 5 and biased.choices[0].prompt_token_ids[0] == 1
    stopped = client.completions.create(**options, logit_bias={"400": 100}, extra_body={"stop_token_ids": [400]})
    assert (stopped.choices[0].finish_reason, stopped.usage.completion_tokens) == ("stop", 0)
    penalised = client.completions.create(
        **options, temperature=0, logit_bias={"400": 1}, frequency_penalty=2, extra_body={"return_token_ids": True}
    )
    assert penalised.choices[0].token_ids.count(400) <= 1


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
        ({"prompt": "a", "presence_penalty": 2.5}, "presence_penalty"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"5000": 1}}, "logit_bias"),
        ({"prompt": "a", "extra_body": {"stop_token_ids": [5000]}}, "stop_token_ids"),
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
