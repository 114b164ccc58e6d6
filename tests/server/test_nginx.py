"""docs/nginx.conf with Debian's nginx: two replicas, one of which goes in the middle of the load."""

import json
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from processes import PATIENCE, Answer, Connection, ServerProcess, stand_in

CONFIGURATION = Path(__file__).resolve().parents[2] / "docs" / "nginx.conf"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


@pytest.fixture
def replicas() -> Iterator[list[ServerProcess]]:
    with stand_in() as one, stand_in() as other:
        yield [one, other]


@pytest.fixture
def port(replicas: list[ServerProcess], tmp_path: Path) -> Iterator[int]:
    """Of nginx in front of the replicas."""
    assert shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin"), "install nginx: scripts/setup.sh test"
    port = free_port()
    text = CONFIGURATION.read_text()
    for default, actual in ((8000, port), (8001, replicas[0].port), (8002, replicas[1].port)):
        text = text.replace(f"127.0.0.1:{default}", f"127.0.0.1:{actual}")
    text = text.replace("/run/nginx.pid", str(tmp_path / "pid"))
    for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"):
        text = text.replace("    access_log off;", f"    access_log off;\n    {kind}_temp_path {tmp_path}/{kind};")
    configuration = tmp_path / "nginx.conf"
    configuration.write_text(text)
    command = ["/usr/sbin/nginx", "-c", str(configuration), "-p", str(tmp_path), "-g", "daemon off;"]
    nginx = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        assert nginx.poll() is None, nginx.stderr.read()
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
    yield port
    nginx.terminate()
    nginx.wait(PATIENCE)
    nginx.stderr.close()


def post(port: int, body: dict) -> Answer:
    with Connection("127.0.0.1", port) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body).encode())
        return connection.answer()


def test_streams_arrive_as_they_are_made(port: int) -> None:
    with Connection("127.0.0.1", port) as connection:
        body = {"max_tokens": 10**6, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body).encode())
        assert connection.head()[0] == 200
        assert b'"token": 0' in connection.chunk()


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGKILL])
def test_a_replica_that_goes(port: int, replicas: list[ServerProcess], sig: signal.Signals) -> None:
    """Requests that come while it drains, and after it has died, are answered by the other one. Streams that it has
    begun go on when it drains."""
    begun = []
    for _ in range(4):
        connection = Connection("127.0.0.1", port)
        body = {"max_tokens": 100, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body).encode())
        connection.head()
        begun.append(connection)
    statuses: list[int] = []

    def load() -> None:
        for _ in range(50):
            statuses.append(post(port, {"max_tokens": 2, "interval": 0.005}).status)

    clients = [threading.Thread(target=load) for _ in range(4)]
    for client in clients:
        client.start()
    replicas[0].process.send_signal(sig)
    for client in clients:
        client.join(PATIENCE)
    if sig == signal.SIGTERM:
        for connection in begun:
            events = b""
            while chunk := connection.chunk():
                events += chunk
            assert events.endswith(b"data: [DONE]\n\n")
        assert replicas[0].wait() == 0
        assert statuses == [200] * 200
    else:  # what the dead one had begun to answer is lost; nothing else is
        assert len(statuses) == 200
        assert statuses.count(200) >= 200 - 4
        assert set(statuses) <= {200, 502}
    assert post(port, {"max_tokens": 1}).status == 200
