"""Streamed, whole and in process: random requests get the same text, tokens, logprobs, usage and end each way.

MIXTRAL_SERVER_CASES sets how many; the suite does a few, scripts/serve_soak.sh many.
"""

import asyncio
import json
import os
import random

import httpx
import pytest

pytest_plugins = ["server_fixtures"]

CASES = int(os.environ.get("MIXTRAL_SERVER_CASES", "40"))
WORDS = "the sea 海 naïve 🙂 [INST] </s> Ünï and\n\t it was, so ـ of 日本 x".split(" ")


def random_case(seed: int) -> dict[str, object]:
    """The body of a request to /v1/completions."""
    draw = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, most)))

    prompts: object = words(60)
    if draw.random() < 0.3:
        prompts = [words(20) for _ in range(draw.randint(1, 3))]
    elif draw.random() < 0.3:
        prompts = [[1, *(draw.randrange(3, 4096) for _ in range(draw.randint(0, 80)))] for _ in range(2)]
    body: dict[str, object] = {
        "prompt": prompts,
        "max_tokens": draw.randint(1, 40),
        "seed": draw.randrange(2**31),
        "temperature": draw.choice([0, 0.7, 1.5]),
        "n": draw.choice([1, 1, 2]),
        "return_token_ids": True,
    }
    optional = {
        "stop": [draw.choice("aeiou "), "th", "\ufffd"][: draw.randint(1, 3)],
        "logprobs": draw.randint(0, 4),
        "top_p": 0.9,
        "top_k": 50,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "ignore_eos": True,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "min_tokens": draw.randint(1, 4),
        "stop_token_ids": [draw.randrange(4096) for _ in range(40)],
        "experts_per_token": draw.randint(1, 4),
    }
    return body | {name: value for name, value in optional.items() if draw.random() < 0.3}


def offline(model, body: dict[str, object]) -> list[tuple]:
    """What generate() says, one result for each prompt and choice."""
    prompts = body["prompt"]
    if isinstance(prompts, str):
        prompts = [prompts]
    results = []
    options = {name: value for name, value in body.items() if name not in ("prompt", "logprobs", "return_token_ids")}
    options["logprobs"] = max(body["logprobs"], 1) if "logprobs" in body else 0
    for prompt in prompts:
        for generation in model.generate(prompt, **options):
            logprobs = [token.logprob for token in generation.logprobs]
            results.append((generation.text, generation.token_ids, logprobs, generation.finish_reason))
    return results


def whole(answer: dict[str, object]) -> list[tuple]:
    return [
        (
            choice["text"],
            choice["token_ids"],
            choice["logprobs"]["token_logprobs"] if choice["logprobs"] else [],
            choice["finish_reason"],
        )
        for choice in answer["choices"]
    ]


def streamed(lines: list[str], choices: int) -> tuple[list[tuple], dict[str, object]]:
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    *chunks, last = [json.loads(event) for event in events[:-1]]
    results = [["", [], [], None] for _ in range(choices)]
    for chunk in chunks:
        (choice,) = chunk["choices"]
        result = results[choice["index"]]
        assert result[3] is None, "a chunk after the end"
        result[0] += choice["text"]
        result[1] += choice["token_ids"]
        result[2] += choice["logprobs"]["token_logprobs"] if choice["logprobs"] else []
        result[3] = choice["finish_reason"]
    assert last["choices"] == []
    return [tuple(result) for result in results], last["usage"]


@pytest.mark.parametrize("first", range(0, CASES, 20))
def test_streamed_whole_and_offline_are_the_same(server_url, server_model, first):
    bodies = [random_case(seed) for seed in range(first, min(first + 20, CASES))]

    async def ask_all() -> list[tuple]:
        limits = httpx.Limits(max_connections=16)
        async with httpx.AsyncClient(base_url=server_url, timeout=120, limits=limits) as client:

            async def ask(body: dict[str, object]) -> tuple:
                answer = await client.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                stream = {**body, "stream": True, "stream_options": {"include_usage": True}}
                async with client.stream("POST", "/v1/completions", json=stream) as response:
                    lines = [line async for line in response.aiter_lines()]
                return answer.json(), lines

            return await asyncio.gather(*(ask(body) for body in bodies))

    for body, (answer, lines) in zip(bodies, asyncio.run(ask_all()), strict=True):
        expected = offline(server_model, body)
        assert whole(answer) == expected, body
        results, usage = streamed(lines, len(expected))
        for counts in (usage, answer["usage"]):  # the second to come finds the first one's prompt in the cache
            assert counts.pop("prompt_tokens_details")["cached_tokens"] <= counts["prompt_tokens"]
        assert (results, usage) == (expected, answer["usage"]), body
        assert answer["usage"]["completion_tokens"] == sum(len(result[1]) for result in expected)
