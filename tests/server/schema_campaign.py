"""Answers of a model with random weights to random schemas: ``python tests/server/schema_campaign.py COUNT [SEED]``."""

import asyncio
import json
import random
import sys
import time
from collections import Counter

import jsonschema
import openai

from random_schemas import random_schema
from running import served, small_model

CLIENTS = 16
MAX_TOKENS = 300
TEMPERATURE = 1.5
FORMATS = jsonschema.FormatChecker(["date", "ipv4", "email", "uuid"])


def check(text: str, schema: dict) -> None:
    """Raises when ``text`` is not JSON, or does not fit."""
    jsonschema.Draft202012Validator(schema, format_checker=FORMATS).validate(json.loads(text))


async def campaign(url: str, count: int, seed: int) -> Counter:
    """How the answers to so many schemas ended: "valid", "cut", "refused", "invalid: ..."."""
    rng = random.Random(seed)
    schemas = [random_schema(rng) for _ in range(count)]
    ends: Counter = Counter()
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:

        async def ask(number: int, schema: dict) -> None:
            answer = await client.chat.completions.create(
                model="mixtral",
                messages=[{"role": "user", "content": "Hi"}],
                max_tokens=MAX_TOKENS,
                temperature=TEMPERATURE,
                seed=number,
                response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
            )
            choice = answer.choices[0]
            if choice.finish_reason == "length":
                ends["cut"] += 1
                return
            try:
                check(choice.message.content, schema)
                ends["valid"] += 1
            except (ValueError, jsonschema.ValidationError) as error:
                ends[f"invalid: {json.dumps(schema)} {choice.message.content!r} {error}"] += 1

        async def client_loop(numbers: list[int]) -> None:
            for number in numbers:
                try:
                    await ask(number, schemas[number])
                except openai.BadRequestError as error:
                    ends[f"refused: {error.message} {json.dumps(schemas[number])}"] += 1

        await asyncio.gather(*(client_loop(list(range(i, count, CLIENTS))) for i in range(CLIENTS)))
    return ends


def main() -> int:
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    begin = time.monotonic()
    with served(small_model(max_queue=CLIENTS)) as url:
        ends = asyncio.run(campaign(url, count, seed))
    for end, number in ends.most_common():
        print(f"{number:6} {end}")
    print(f"{count} schemas, seed {seed}, T={TEMPERATURE}, {time.monotonic() - begin:.0f} s")
    return 0 if sum(ends[end] for end in ("valid", "cut")) == count else 1


if __name__ == "__main__":
    sys.exit(main())
