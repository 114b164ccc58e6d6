"""Load with faults: every request is accounted for, and nothing is left behind.

    .venv/bin/python tests/server/soak.py --requests 10000 --connections 64

A request is lost when it has no end or two, when its text or its log probabilities are not those that the same request
has alone, or when it fails in a way that was not asked for.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "benchmarks"), str(Path(__file__).resolve().parent)]

from http_load import Client, Outcome  # noqa: E402
from processes import ServerProcess, small_server  # noqa: E402

KINDS = 200  # different requests; the first of them is sent far more often than the others
VOCAB, CONTEXT = 4096, 1024
STREAMED, CUT, INVALID, TOO_LONG, CANARY = 0.30, 0.10, 0.05, 0.02, 0.12
BROKEN = [
    b"{",
    b'{"prompt": NaN}',
    b'{"prompt": "a", "prompt": "b"}',
    b'{"prompt": "\xff"}',
    b"[]",
    json.dumps({"prompt": "a", "temperature": -1}).encode(),
    json.dumps({"prompt": "a", "max_tokens": 0}).encode(),
    json.dumps({"prompt": [VOCAB]}).encode(),
    json.dumps({"prompt": "a", "n": 1000}).encode(),
    json.dumps({"prompt": "a", "tempreture": 1}).encode(),
]


@dataclass
class Report:
    outcomes: Counter = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    canaries: Counter = field(default_factory=Counter)  # by their choices, as text
    seconds: float = 0.0
    memory: list[int] = field(default_factory=list)  # at one fifth of the requests, and at the end


def requests_of(seed: int) -> list[dict]:
    """1 to 32 tokens of prompt and 1 to 16 of answer, greedy and sampled."""
    numbers = random.Random(seed)
    result = []
    for _ in range(KINDS):
        body = {
            "prompt": [numbers.randrange(3, VOCAB) for _ in range(numbers.randint(1, 32))],
            "max_tokens": numbers.randint(1, 16),
            "temperature": numbers.choice([0.0, 0.7, 1.0]),
            "seed": numbers.randrange(2**31),
            "logprobs": numbers.choice([None, 2]),
        }
        result.append(body)
    return [{**result[0], "logprobs": 5, "max_tokens": 16}, *result[1:]]


async def soak(server: ServerProcess, requests: int, connections: int, seed: int = 0) -> Report:
    report = Report()
    bodies = requests_of(seed)
    alone = Client(server.host, server.port)
    expected = [_text((await alone.post(body)).choices) for body in bodies]
    alone.close()
    numbers = random.Random(seed + 1)
    todo = [_plan(numbers, bodies) for _ in range(requests)]
    done = 0
    start = time.perf_counter()

    async def worker() -> None:
        nonlocal done
        client = Client(server.host, server.port)
        while todo:
            kind, index, body, cut_after = todo.pop()
            outcome = await client.post(body, cut_after)
            _account(report, kind, outcome, expected[index])
            if index == 0 and kind == "valid" and not outcome.cut:
                report.canaries[_text(outcome.choices)] += 1
            done += 1
            if done in (requests // 5, requests):
                report.memory.append(server.memory())
        client.close()

    await asyncio.gather(*(worker() for _ in range(connections)))
    report.seconds = time.perf_counter() - start
    return report


def _plan(numbers: random.Random, bodies: list[dict]) -> tuple[str, int, dict | bytes, int | None]:
    fault = numbers.random()
    index = 0 if numbers.random() < CANARY else numbers.randrange(len(bodies))
    if fault < INVALID:
        return "invalid", index, numbers.choice(BROKEN), None
    if fault < INVALID + TOO_LONG:
        return "too long", index, {"prompt": [5] * (CONTEXT + 1), "max_tokens": 1}, None
    body = {**bodies[index], "stream": numbers.random() < STREAMED}
    cut_after = numbers.randrange(16) if numbers.random() < CUT else None
    return "valid", index, body, cut_after


def _text(choices: list[dict]) -> str:
    return json.dumps([[choice["text"], choice["logprobs"], choice["finish_reason"]] for choice in choices])


def _account(report: Report, kind: str, outcome: Outcome, expected: str) -> None:
    report.outcomes[kind, "cut" if outcome.cut else outcome.status] += 1
    if outcome.cut:
        return
    if kind != "valid":
        fine = outcome.status == 400 and outcome.error is not None
    else:
        fine = (
            outcome.status == 200 and outcome.error is None and outcome.ends == 1 and _text(outcome.choices) == expected
        )
    if not fine:
        report.lost.append(
            f"{kind}: {outcome.status} {outcome.ends} ends {outcome.error} {_text(outcome.choices)[:200]}"
        )


def idle(server: ServerProcess) -> dict[str, float]:
    """What the server still holds, once it has had time to let go of it."""
    end = time.monotonic() + 20
    while True:
        lines = [line.split() for line in server.get("/metrics").body.decode().splitlines() if not line.startswith("#")]
        values = {name.partition("{")[0].removeprefix("mixtral:"): float(value) for name, value in lines}
        held = {name: values[name] for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")}
        if not any(held.values()) or time.monotonic() > end:
            return held
        time.sleep(0.1)


def settled_descriptors(server: ServerProcess, most: int) -> int:
    """How many the server has, once it has had time to close connections that are over."""
    end = time.monotonic() + 20
    while server.descriptors() > most and time.monotonic() < end:
        time.sleep(0.05)
    return server.descriptors()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=10000)
    parser.add_argument("--connections", type=int, default=64)
    arguments = parser.parse_args()
    with small_server() as server:
        descriptors = server.descriptors()
        report = asyncio.run(soak(server, arguments.requests, arguments.connections))
        held = idle(server)
        after = settled_descriptors(server, descriptors)
    rate = arguments.requests / report.seconds
    print(f"{arguments.requests} requests on {arguments.connections} connections, {rate:.0f} a second")
    for (kind, status), count in sorted(report.outcomes.items(), key=str):
        print(f"  {kind}, {status}: {count}")
    print(f"lost: {len(report.lost)}", *report.lost[:5], sep="\n  ")
    print(f"one prompt {sum(report.canaries.values())} times: {len(report.canaries)} answer(s)")
    print(f"held at the end: {held}; descriptors {descriptors} -> {after}")
    first, last = report.memory
    print(
        f"memory at one fifth and at the end: {first / 2**20:.0f} MiB, {last / 2**20:.0f} MiB ({last / first - 1:+.1%})"
    )
    fine = not report.lost and len(report.canaries) == 1 and not any(held.values()) and after <= descriptors
    print("passed" if fine and last <= 1.05 * first else "FAILED")
    return 0 if fine and last <= 1.05 * first else 1


if __name__ == "__main__":
    sys.exit(main())
