"""A server that says what a test tells it to, for what the page makes of it."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mixtral

PAGE = Path(mixtral.__file__).parent / "server" / "page.html"
LAYERS, EXPERTS = 3, 4
MODEL = {"id": "fake", "num_layers": LAYERS, "num_experts": EXPERTS, "experts_per_token": 2, "chat_format": "a fake"}


def route(token: int) -> list[list[int]]:
    """[L, K]: other experts for every token and layer."""
    return [[(token + layer) % EXPERTS, (token + layer + 1) % EXPERTS] for layer in range(LAYERS)]


def rows(tokens: list[tuple[int, bytes]], prompt: bool = False) -> dict:
    return {
        "routed_tokens": [{"id": number, "bytes": list(text), "prompt": prompt} for number, text in tokens],
        "routed_experts": [route(number) for number, _ in tokens],
        "routed_weights": [[[0.75, 0.25]] * LAYERS for _ in tokens],
    }


def chunk(text: str | None, chat: bool, reason: str | None = None, **extra: object) -> dict:
    said = {"delta": {"content": text}} if chat else {"text": text}
    return {"choices": [{"index": 0, **said, "finish_reason": reason, **extra}]}


def answer(words: list[str], chat: bool) -> Iterator[dict]:
    """As the server streams: the routing of a token comes with the next one, that of the last one never."""
    extra = rows([(0, b"<s>")], prompt=True)
    for number, word in enumerate(words):
        yield chunk(word, chat, **extra)
        extra = rows([(number, word.encode())])
    yield chunk("", chat, "length")
    yield {"choices": [], "usage": {"completion_tokens": len(words)}}


class FakeServer:
    """``events``: what the next answers hold: dicts, bytes as they are, or seconds to wait. ``bodies``: of requests."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.events: Callable[[dict, bool], Iterator[dict | bytes | float]] = lambda body, chat: answer(["Hi"], chat)
        self.bodies: list[dict] = []
        self.status = 200
        self.key: str | None = None
        self.gone = threading.Event()  # a client went before its answer had ended


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def reply(self, status: int, kind: str, data: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def refused(self) -> bool:
            if fake.key and self.headers["Authorization"] != f"Bearer {fake.key}":
                self.reply(401, "application/json", b'{"error": {"message": "a key is needed"}}')
                return True
            return False

        def do_GET(self) -> None:
            if self.path == "/":
                self.reply(200, "text/html; charset=utf-8", PAGE.read_bytes())
            elif self.path == "/v1/models":
                if not self.refused():
                    self.reply(200, "application/json", json.dumps({"data": [MODEL]}).encode())
            else:
                self.reply(404, "text/plain", b"")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fake.bodies.append(body)
            if fake.status != 200:
                return self.reply(fake.status, "application/json", b'{"error": {"message": "not today"}}')
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            try:
                for event in fake.events(body, "chat" in self.path):
                    if isinstance(event, float):
                        time.sleep(event)
                    else:
                        data = event if isinstance(event, bytes) else f"data: {json.dumps(event)}\n\n".encode()
                        self.wfile.write(data)
                        self.wfile.flush()
                self.wfile.write(b"data: [DONE]\n\n")
            except ConnectionError:
                fake.gone.set()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake = FakeServer(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
