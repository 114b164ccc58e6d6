"""The phases of a server, its signals, deadlines and watchdog: every request ends exactly once."""

import json
import signal
import time
from collections.abc import Iterator

import pytest

from processes import Connection, ServerProcess, small_server, stand_in

LONG = {"max_tokens": 10**6, "stream": True}


def stream(server: ServerProcess, **body: object) -> Connection:
    """A stream whose first event has come."""
    connection = server.connect()
    connection.request("POST", "/v1/completions", json.dumps({**LONG, **body}).encode())
    assert connection.head()[0] == 200
    connection.chunk()
    return connection


def rest_of(connection: Connection) -> list[str]:
    """The events until the server ends the answer."""
    events = b""
    while chunk := connection.chunk():
        events += chunk
    return [event.removeprefix("data: ") for event in events.decode().split("\n\n")[:-1]]


def health(server: ServerProcess) -> tuple[int, int, int]:
    return tuple(server.get(f"/health{path}").status for path in ("/live", "/ready", ""))


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    with stand_in() as process:
        yield process


def test_health_while_loading_and_ready() -> None:
    with stand_in(wait=False, load=2.0) as server:
        assert health(server) == (200, 503, 503)
        for answer in (server.get("/v1/models"), server.post("/v1/completions", {})):
            assert (answer.status, answer.headers["retry-after"], answer.error["code"]) == (503, "5", "loading")
        server.line("ready")
        assert health(server) == (200, 200, 200)
        assert server.get("/v1/models").status == 200


def test_a_signal_while_loading_ends_at_once() -> None:
    with stand_in(wait=False, load=1000.0) as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 128 + signal.SIGTERM


def test_what_loading_raises_ends_the_process() -> None:
    with stand_in(wait=False, broken=True) as server:
        assert server.wait() == 1
        assert "no such model" in "".join(server.raw)


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(server: ServerProcess, sig: signal.Signals) -> None:
    """16 streams go on to their end, nobody new is taken, and then the process ends with 0."""
    streams = [stream(server, max_tokens=100) for _ in range(16)]
    idle = server.connect()
    server.process.send_signal(sig)
    server.line("signal", open_requests=16)
    assert health(server) == (200, 503, 503)
    answer = server.post("/v1/completions", {})
    assert (answer.status, answer.error["code"], answer.headers["connection"]) == (503, "draining", "close")
    for connection in streams:
        assert rest_of(connection)[-1] == "[DONE]"
    assert server.wait() == 0
    assert idle.closed()


def test_a_drain_that_takes_too_long() -> None:
    with stand_in(limits={"drain": 0.3}) as server:
        streams = [stream(server) for _ in range(4)]
        server.process.send_signal(signal.SIGTERM)
        for connection in streams:
            events = rest_of(connection)
            assert json.loads(events[-1])["error"]["code"] == "shutting_down"
            assert "[DONE]" not in events
        assert server.wait() == 128 + signal.SIGTERM


def test_a_second_signal_ends_at_once(server: ServerProcess) -> None:
    streams = [stream(server) for _ in range(4)]
    whole = server.connect()
    whole.request("POST", "/v1/completions", json.dumps({**LONG, "stream": False}).encode())
    while server.running() < 5:
        time.sleep(0.02)
    server.process.send_signal(signal.SIGTERM)
    server.line("signal", open_requests=5)
    server.process.send_signal(signal.SIGTERM)
    for connection in streams:
        assert json.loads(rest_of(connection)[-1])["error"]["code"] == "shutting_down"
    answer = whole.answer()
    assert (answer.status, answer.error["code"]) == (503, "shutting_down")
    assert server.wait() == 128 + signal.SIGTERM


def test_a_client_that_does_not_read_holds_no_shutdown_up() -> None:
    with stand_in(pad=10**5) as server, stream(server, interval=0):
        for _ in range(2):
            server.process.send_signal(signal.SIGTERM)
            server.line("signal")
        assert server.wait(10) == 128 + signal.SIGTERM


@pytest.mark.parametrize("streamed", [False, True])
def test_a_deadline(streamed: bool) -> None:
    with stand_in(limits={"request_deadline": 0.5}) as server:
        if streamed:
            events = rest_of(stream(server))
            assert json.loads(events[-1])["error"]["code"] == "timeout"
            assert "[DONE]" not in events
        else:
            answer = server.post("/v1/completions", {**LONG, "stream": False})
            assert (answer.status, answer.error["code"]) == (504, "timeout")
        assert server.running() == 0
        assert server.post("/v1/completions", {"max_tokens": 1}).status == 200


@pytest.mark.parametrize(
    ("fault", "reason"), [("/stick", "a forward pass took longer"), ("/break", "rank 1 was killed")]
)
def test_the_watchdog(fault: str, reason: str) -> None:
    """An engine that hangs or has failed: open requests get an error, the health routes say it, and the process ends
    with 5."""
    with stand_in(limits={"watchdog": 0.3}, pad=10**5) as server:
        open_stream = stream(server)
        unread = stream(server, interval=0)  # its last words hold the end up for a second
        time.sleep(0.5)  # until nothing more fits between the two
        watching = server.connect()
        server.post(fault, {})
        assert reason in server.line("the engine is dead")["reason"]
        watching.request("GET", "/health/live")
        assert watching.answer().status == 500
        watching.request("GET", "/health/ready")
        assert watching.answer().status == 503
        error = json.loads(rest_of(open_stream)[-1])["error"]
        assert error["code"] == "engine_dead"
        assert reason in error["message"]
        assert server.wait() == 5
        unread.close()


def test_an_engine_that_loses_a_rank() -> None:
    """Every open request gets the reason, whatever the events of its end say, and the process ends with 5."""
    with small_server(breaks_after=3) as server:
        body = {"prompt": "Once", "max_tokens": 900, "ignore_eos": True}
        whole = server.connect()
        whole.request("POST", "/v1/completions", json.dumps(body).encode())
        answer = server.post("/v1/completions", {**body, "stream": True})
        errors = [whole.answer().error, json.loads(answer.events()[-1])["error"]]
        assert [error["code"] for error in errors] == ["engine_dead", "engine_dead"]
        assert all("rank 1 was killed" in error["message"] for error in errors)
        assert server.wait() == 5


def test_a_server_that_works_is_left_alone() -> None:
    with stand_in(limits={"watchdog": 0.2}) as server:
        time.sleep(1)
        assert server.get("/health/live").status == 200


def test_a_port_in_use(server: ServerProcess) -> None:
    from mixtral.server.run import listen

    with pytest.raises(ValueError, match=f"port {server.port}.*in use"):
        listen(server.host, server.port)


def test_only_the_port_of_http_listens(server: ServerProcess) -> None:
    import psutil

    sockets = psutil.Process(server.process.pid).net_connections()
    assert [s.laddr for s in sockets if s.status == psutil.CONN_LISTEN] == [("127.0.0.1", server.port)]
