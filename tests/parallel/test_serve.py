"""``mixtral serve`` on a model in several processes."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from binary import DEMO, ROOT, environment
from processes import PATIENCE, ServerProcess
from rank_processes import ALL_GONE, children_of, is_gone, listening_addresses, wait_until

TP2, TP2_PP2 = ["--tp", "2"], ["--tp", "2", "--pp", "2"]
BODIES = [
    {"prompt": "In the beginning", "temperature": 0, "max_tokens": 16, "logprobs": 2},
    {"prompt": ["And it came to pass", "Once"], "max_tokens": 8, "temperature": 0.8, "seed": 3, "n": 2},
    {"prompt": "And God said", "temperature": 0, "max_tokens": 12, "stream": True, "ignore_eos": True},
]


def start(*flags: str, **options: object) -> ServerProcess:
    return ServerProcess(
        [sys.executable, "-m", "mixtral", "serve", str(DEMO), "--port", "0", *flags],
        env=environment(PYTHONPATH=str(ROOT / "python")),
        **options,
    )


@contextmanager
def serving(*flags: str) -> Iterator[tuple[ServerProcess, list[int]]]:
    """A server that is ready, and its ranks."""
    with start(*flags) as server:
        pids = [server.process.pid, *children_of(server.process.pid)]
        yield server, pids
    wait_until(lambda: all(map(is_gone, pids)), "the end of all ranks", ALL_GONE)


def answers(server: ServerProcess) -> list[object]:
    """All that does not change from one request to the next."""
    found = []
    for body in BODIES:
        answer = server.post("/v1/completions", {**body, "return_token_ids": True})
        assert answer.status == 200, answer.body
        parts = [json.loads(event) for event in answer.events()[:-1]] if "stream" in body else [answer.json()]
        found += [[part["choices"], part.get("usage")] for part in parts]
    return found


def joined(found: list) -> list:
    """The texts of a stream may be cut otherwise."""
    return found[:2] + ["".join(choice["text"] for choices, _ in found[2:] for choice in choices)]


@pytest.fixture(scope="module")
def alone() -> list[object]:
    with serving() as (server, _):
        return joined(answers(server))


@pytest.mark.parametrize("flags", [TP2, TP2_PP2], ids=["tp2", "tp2pp2"])
def test_answers_are_those_of_one_process(flags, alone):
    with serving(*flags) as (server, pids):
        assert len(pids) >= (2 if flags == TP2 else 4)  # and the server's helper
        assert joined(answers(server)) == alone
        assert server.get("/health/ready").status == 200
        assert listening_addresses(pids[1:]) == set()
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        wait_until(lambda: all(map(is_gone, pids)), "the end of all ranks", ALL_GONE)


def test_not_ready_before_all_ranks_are():
    with start(*TP2, wait=False) as server:
        wait_until(lambda: children_of(server.process.pid), "starting the rank")
        (child,) = children_of(server.process.pid)
        os.kill(child, signal.SIGSTOP)
        time.sleep(1)
        assert (server.get("/health/live").status, server.get("/health/ready").status) == (200, 503)
        os.kill(child, signal.SIGCONT)
        server.line("ready")
        assert server.get("/health/ready").status == 200


@pytest.mark.parametrize(
    ("flags", "rank", "busy"),
    [(TP2_PP2, 1, True), (TP2_PP2, 2, True), (TP2_PP2, 3, True), (TP2, 1, False)],
    ids=["1-busy", "2-busy", "3-busy", "1-idle"],
)
def test_a_killed_rank_ends_the_server(flags, rank, busy):
    """Every open request gets one error, nobody is ready any more, and the exit status is 5."""
    with serving(*flags) as (server, pids):
        stream, whole = server.connect(), server.connect()
        if busy:
            body = {"prompt": "Once", "max_tokens": 3000, "ignore_eos": True}
            stream.request("POST", "/v1/completions", json.dumps({**body, "stream": True}).encode())
            whole.request("POST", "/v1/completions", json.dumps(body).encode())
            assert stream.head()[0] == 200 and stream.chunk()
        os.kill(pids[rank], signal.SIGKILL)
        begin = time.monotonic()
        if busy:
            events = b""
            while chunk := stream.chunk():
                events += chunk
            last = events.decode().split("\n\n")[-2]
            assert f"rank {rank}" in json.loads(last.removeprefix("data: "))["error"]["message"]
            assert events.count(b'"error"') == 1 and b"[DONE]" not in events
            answer = whole.answer()
            assert answer.status == 500 and f"rank {rank}" in answer.error["message"]
        assert server.wait() == 5
        assert time.monotonic() - begin < ALL_GONE
        assert f"rank {rank} " in server.line("the engine is dead")["reason"]


def test_a_stopped_rank_ends_the_server():
    with serving(*TP2, "--rank-timeout", "3") as (server, pids):
        os.kill(pids[1], signal.SIGSTOP)
        begin = time.monotonic()
        answer = server.post("/v1/completions", {"prompt": "Once", "max_tokens": 4})
        assert answer.status == 500 and "rank 1" in answer.error["message"]
        assert server.wait() == 5
        assert 2 < time.monotonic() - begin < 3 + ALL_GONE


def test_a_killed_server_leaves_no_rank():
    with serving(*TP2) as (server, pids):
        server.process.kill()
        wait_until(lambda: all(map(is_gone, pids)), "the end of all ranks", ALL_GONE)


def test_a_signal_while_loading_leaves_no_rank():
    with start(*TP2, wait=False) as server:
        wait_until(lambda: children_of(server.process.pid), "starting the rank")
        pids = children_of(server.process.pid)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait(10) == 128 + signal.SIGTERM
        wait_until(lambda: all(map(is_gone, pids)), "the end of all ranks", ALL_GONE)


def test_sizes_that_do_not_divide_the_model():
    with start("--tp", "4", wait=False) as server:
        assert server.wait(PATIENCE) == 3
        assert "4" in server.raw[-1]
