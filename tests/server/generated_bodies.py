"""Bodies that nobody would write: valid ones with fields replaced, removed and added, and bytes changed.

.venv/bin/python tests/server/generated_bodies.py --count 5000
"""

import argparse
import asyncio
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from processes import small_server  # noqa: E402

CANARY = ("/v1/completions", {"prompt": [5, 6, 7, 8], "max_tokens": 8, "seed": 3, "logprobs": 5})
EVERY = 100  # bodies between two canaries

SAMPLING = {
    "temperature": 1.0,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "n": 2,
    "max_tokens": 4,
    "min_tokens": 1,
    "seed": 1,
    "stop": ["a"],
    "stop_token_ids": [5],
    "logit_bias": {"5": 1.0},
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.1,
    "stream": True,
    "stream_options": {"include_usage": True},
    "ignore_eos": True,
    "experts_per_token": 1,
    "user": "me",
    "model": "small",
}
MESSAGES = [{"role": "system", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {}}}}}
ROUTES = {
    "/v1/completions": {**SAMPLING, "prompt": "abc", "logprobs": 2, "echo": True},
    "/v1/chat/completions": {
        **SAMPLING,
        "messages": MESSAGES,
        "logprobs": True,
        "top_logprobs": 2,
        "tools": [TOOL],
        "tool_choice": "auto",
        "response_format": {"type": "json_object"},
    },
    "/tokenize": {"prompt": "abc", "add_special_tokens": True, "return_token_strs": True},
    "/detokenize": {"tokens": [5, 6]},
}
REQUIRED = ("prompt", "messages", "tokens")
ODD = [
    None,
    True,
    0,
    -1,
    1,
    1.5,
    2**31,
    2**63,
    -(2**70),
    1e308,
    "",
    "a",
    "\0",
    "\ud83d\ude42" * 10,
    "é" * 300,
    "[INST]</s>",
    [],
    [[]],
    {},
    [0],
    [-1],
    [4095, 4096],
    ["a", None],
    {"a": {"b": []}},
    "x" * 10000,
]


def bodies(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    numbers = random.Random(seed)
    for _ in range(count):
        path = numbers.choice(list(ROUTES))
        body = dict(ROUTES[path])
        for name in list(body):
            if numbers.random() < (0.05 if name in REQUIRED else 0.6):
                del body[name]
        if not body.get("stream"):
            body.pop("stream_options", None)
        for _ in range(numbers.choice([0, 1, 1, 2, 3])):
            body = _changed(numbers, body, ROUTES[path])
        data = json.dumps(body).encode()
        for _ in range(numbers.choice([0] * 8 + [1, 3])):
            place = numbers.randrange(len(data))
            data = data[:place] + bytes([numbers.randrange(256)]) + data[place + numbers.randrange(2) :]
        yield path, data


def _changed(numbers: random.Random, value: object, names: dict) -> object:
    """``value`` with something odd at a random depth."""
    if numbers.random() < 0.3 or not value:
        return numbers.choice(ODD)
    if isinstance(value, dict):
        name = numbers.choice([*names, *value, "unknown"])
        return {**value, name: _changed(numbers, value.get(name), {})}
    if isinstance(value, list):
        place = numbers.randrange(len(value))
        return [*value[:place], _changed(numbers, value[place], {}), *value[place + 1 :]]
    return numbers.choice(ODD)


async def campaign(host: str, port: int, count: int) -> tuple[Counter, int, list[str]]:
    """-> answers by status, canaries that were sent, and what went wrong."""
    from http_load import Client

    statuses: Counter = Counter()
    wrong: list[str] = []
    canary = None
    sent = 0
    for i, (path, body) in enumerate(bodies(count, seed=1)):
        client = Client(host, port, path)
        outcome = await client.post(body)
        client.close()
        statuses[outcome.status] += 1
        if outcome.status >= 500 or outcome.status == 0 or (outcome.error and outcome.status == 200):
            wrong.append(f"{path} {body[:300]!r}: {outcome.status} {outcome.error}")
        if i % EVERY == 0:
            client = Client(host, port, CANARY[0])
            choices = json.dumps((await client.post(CANARY[1])).choices)
            client.close()
            canary = canary or choices
            sent += 1
            if choices != canary:
                wrong.append(f"the canary changed after {i} bodies: {choices[:300]}")
    return statuses, sent, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=5000)
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    with small_server() as server:
        statuses, canaries, wrong = asyncio.run(campaign(server.host, server.port, arguments.count))
        alive = server.process.poll() is None
    print(f"{arguments.count} bodies, by status: {dict(sorted(statuses.items()))}")
    print(f"{canaries} canaries; wrong: {len(wrong)}", *wrong[:10], sep="\n  ")
    print("passed" if alive and not wrong else "FAILED")
    return 0 if alive and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
