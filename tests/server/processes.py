"""Servers in processes of their own, and clients that speak to them byte by byte."""

import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

PATIENCE = 180.0  # seconds after which a wait has failed


class ServerProcess:
    """``command``, which logs as the server does. Ready when the constructor returns, unless ``wait`` is False."""

    def __init__(self, command: Sequence[str], wait: bool = True, **options: object) -> None:
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace", **options)
        self.lines: list[dict] = []
        self.raw: list[str] = []
        self._news: queue.Queue[dict] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        url = urlsplit(self.line("listening")["url"])
        self.host, self.port = url.hostname, url.port
        self.url = f"http://{self.host}:{self.port}"
        if wait:
            self.line("ready")

    def _read(self) -> None:
        for text in self.process.stderr:
            self.raw.append(text)
            try:
                line = json.loads(text)
            except ValueError:
                sys.stderr.write(text)  # a library's own warning, for the report of a test that fails
                continue
            self.lines.append(line)
            self._news.put(line)
        self._news.put({"message": "end"})

    def line(self, message: str, **fields: object) -> dict:
        """The next line of the log with this message and these fields."""
        end = time.monotonic() + PATIENCE
        while True:
            line = self._news.get(timeout=max(0.01, end - time.monotonic()))
            if line["message"] == message and all(line.get(name) == value for name, value in fields.items()):
                return line
            assert line["message"] != "end", f"the server ended: {''.join(self.raw)[-2000:]}"

    def connect(self) -> "Connection":
        return Connection(self.host, self.port)

    def get(self, path: str, **headers: str) -> "Answer":
        return self.send("GET", path, None, **headers)

    def post(self, path: str, body: object, **headers: str) -> "Answer":
        return self.send("POST", path, json.dumps(body).encode(), **headers)

    def send(self, method: str, path: str, body: bytes | None, **headers: str) -> "Answer":
        with self.connect() as connection:
            connection.request(method, path, body, **headers)
            return connection.answer()

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def memory(self) -> int:
        """Bytes in memory; 0 with AddressSanitizer (scripts/sanitize.sh), which keeps what is freed."""
        if "libasan" in os.environ.get("LD_PRELOAD", ""):
            return 0
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def gauge(self, name: str) -> float:
        """Of ``/metrics``, without labels and prefix."""
        lines = self.get("/metrics").body.decode().splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"mixtral:{name}{{"))

    def running(self) -> int:
        """Generations that have begun and not ended."""
        return int(self.gauge("num_requests_running"))

    def wait(self, seconds: float = PATIENCE) -> int:
        return self.process.wait(seconds)

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()


def command(script: str, options: dict) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name(script)), json.dumps(options)]


def stand_in(wait: bool = True, **options: object) -> ServerProcess:
    """The server around an application without a model (stand_in.py)."""
    return ServerProcess(command("stand_in.py", options), wait)


def small_server(wait: bool = True, **options: object) -> ServerProcess:
    """The whole server around a small model with random weights (small_server.py)."""
    return ServerProcess(command("small_server.py", options), wait)


class Answer:
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    def json(self) -> dict:
        return json.loads(self.body)

    @property
    def error(self) -> dict:
        return self.json()["error"]

    def events(self) -> list[str]:
        """What follows ``data: ``, of a stream."""
        parts = self.body.decode().split("\n\n")
        assert parts.pop() == ""
        return [part.removeprefix("data: ") for part in parts]


class Connection:
    """A socket that takes any bytes, and reads answers of HTTP/1.1."""

    def __init__(self, host: str, port: int) -> None:
        self.socket = socket.create_connection((host, port), PATIENCE)
        self.buffer = b""

    def send(self, data: bytes) -> None:
        """What the server does not take any more is dropped."""
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> None:
        fields = {"host": "test"}
        if body is not None:
            fields |= {"content-type": "application/json", "content-length": str(len(body))}
        fields |= {name.replace("_", "-"): value for name, value in headers.items()}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self.send(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + (body or b""))

    def read_until(self, mark: bytes) -> bytes:
        while mark not in self.buffer:
            if not (data := self.socket.recv(65536)):
                raise EOFError(self.buffer)
            self.buffer += data
        before, _, self.buffer = self.buffer.partition(mark)
        return before + mark

    def read(self, size: int) -> bytes:
        while len(self.buffer) < size:
            if not (data := self.socket.recv(65536)):
                raise EOFError(self.buffer)
            self.buffer += data
        result, self.buffer = self.buffer[:size], self.buffer[size:]
        return result

    def head(self) -> tuple[int, dict[str, str]]:
        first, *lines = self.read_until(b"\r\n\r\n").decode().strip().split("\r\n")
        return int(first.split()[1]), {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
        }

    def chunk(self) -> bytes:
        size = int(self.read_until(b"\r\n"), 16)
        return self.read(size + 2)[:-2]

    def answer(self) -> Answer:
        status, headers = self.head()
        if "content-length" in headers:
            return Answer(status, headers, self.read(int(headers["content-length"])))
        chunks = []
        while chunk := self.chunk():
            chunks.append(chunk)
        return Answer(status, headers, b"".join(chunks))

    def closed(self) -> bool:
        """Whether the server closes the connection; waits for it."""
        try:
            while self.socket.recv(65536):
                pass
        except ConnectionResetError:
            pass
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
