"""An engine that has all it may take, and one that hangs."""

import asyncio
import json
from collections import Counter

from http_load import Client, Outcome
from processes import Connection, ServerProcess, small_server
from soak import VOCAB, idle

SHORT = {"prompt": [5, 6], "max_tokens": 4, "ignore_eos": True, "temperature": 0}


def start(server: ServerProcess, body: dict) -> Connection:
    """A request whose answer is read later."""
    connection = server.connect()
    connection.request("POST", "/v1/completions", json.dumps(body).encode())
    return connection


def waits(server: ServerProcess) -> int:
    """Requests that the engine has and has not run."""
    return int(server.gauge("num_requests_waiting"))


def hold(server: ServerProcess) -> None:
    assert server.post("/hold", {}).status == 200


def release(server: ServerProcess) -> None:
    assert server.post("/release", {}).status == 200


def test_a_burst_of_2000_gets_256_places() -> None:
    """Nothing ends during the burst: 256 wait, each of the others is told to come back, and no place is lost."""

    async def burst(server: ServerProcess) -> list[Outcome]:
        todo, outcomes = [SHORT] * 2000, []

        async def client() -> None:
            connection = Client(server.host, server.port)
            while todo:
                outcomes.append(await connection.post(todo.pop()))
            connection.close()

        async def let_go() -> None:
            while len(outcomes) < 2000 - 256:
                await asyncio.sleep(0.01)
            refused = await Client(server.host, server.port).post({**SHORT, "prompt": [VOCAB]})
            assert refused.status == 429  # before anybody has looked at the prompt
            await asyncio.to_thread(release, server)

        await asyncio.gather(let_go(), *(client() for _ in range(256 + 64)))
        return outcomes

    with small_server(model={"max_queue": 257}) as server:
        hold(server)  # with one request
        outcomes = asyncio.run(burst(server))
        assert Counter(outcome.status for outcome in outcomes) == {429: 2000 - 256, 200: 256}
        assert len({outcome.choices[0]["text"] for outcome in outcomes if outcome.status == 200}) == 1
        assert {outcome.error["code"] for outcome in outcomes if outcome.status == 429} == {"queue_full"}
        assert not any(idle(server).values())
        assert server.post("/v1/completions", {**SHORT, "prompt": [VOCAB]}).status == 400
        # All places are free again.
        assert server.post("/v1/completions", {**SHORT, "prompt": [[5]] * 64, "n": 4, "max_tokens": 1}).status == 200


def test_the_tokens_of_waiting_prompts_are_limited() -> None:
    with small_server(model={"max_queue_tokens": 1000}) as server:
        hold(server)  # with a token
        first = start(server, {**SHORT, "prompt": [5] * 600})
        while waits(server) < 1:
            pass
        answer = server.post("/v1/completions", {**SHORT, "prompt": [5] * 400})
        assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (429, "queue_full", "1")
        second = start(server, {**SHORT, "prompt": [5] * 399})
        while waits(server) < 2:
            pass
        answer = server.post("/v1/completions", {**SHORT, "prompt": [5] * 1001})
        assert (answer.status, answer.error["param"]) == (400, "prompt")
        release(server)
        assert first.answer().status == second.answer().status == 200
        assert server.post("/v1/completions", {**SHORT, "prompt": [5] * 1000}).status == 200


def test_the_watchdog_ends_a_server_whose_engine_hangs() -> None:
    with small_server(limits={"watchdog": 0.5}, model={"max_position": 16384}) as server:
        stream = start(server, {**SHORT, "max_tokens": 16000, "stream": True})
        assert stream.head()[0] == 200
        stream.chunk()
        hold(server)
        whole = start(server, SHORT)
        server.line("the engine is dead")
        assert whole.answer().error["code"] == "engine_dead"
        last = b""
        while chunk := stream.chunk():
            last = chunk
        assert json.loads(last.split(b"data: ")[-1])["error"]["code"] == "engine_dead"
        assert server.wait() == 5
