"""How much of the server one client can take: the limits, and the protocol class that keeps those of HTTP/1.1.

``LimitedProtocol`` is uvicorn's protocol on llhttp with what uvicorn leaves out: the size of a head, deadlines for
heads and bodies, the number of connections, clients that never read. What it refuses never reaches the application.
"""

import asyncio
import json
import logging
import resource
import socket
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .errors import ApiError

logger = logging.getLogger("mixtral.server")

LINGER = 1.0  # seconds in which a refused client may read why
SEND_BUFFER = 2**17  # bytes in the kernel for one client: with megabytes, a slow reader looks like none for long
CHUNK_HEAD = 32  # bytes of a chunk that are not its data: size, extension, line ends


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes, times in seconds."""

    connections: int = 512
    head: int = 16 * 1024
    head_fields: int = 64
    uri: int = 4 * 1024
    head_deadline: float = 10
    body: int = 2 * 1024 * 1024
    body_deadline: float = 30
    chunks: int = 4096
    json_depth: int = 64
    idle: float = 60  # a connection between two requests
    write_stall: float = 30  # a client that does not read
    request_deadline: float = 600
    drain: float = 30
    watchdog: float = 120  # a forward pass that does not end

    def fitting_descriptors(self) -> int:
        """Connections that leave descriptors for everything else; the accept loop then never runs out of them."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return max(1, min(self.connections, soft - 48))


class Refused(Exception):
    """Ends the parsing of a request."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class LimitedProtocol(HttpToolsProtocol):
    """One connection. ``limits`` is bound by ``functools.partial`` where uvicorn is given this class."""

    def __init__(self, *args: Any, limits: Limits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limits = limits
        self.max_connections = limits.fitting_descriptors()
        self.in_head = True  # the next byte belongs to a head
        self.overhead = 0  # bytes of this message that are not its body
        self.chunks = 0
        self.body_bytes = 0
        self.refusal: Refused | None = None
        self.deadline: asyncio.TimerHandle | None = None  # of the head or the body that is being read
        self.stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if len(self.connections) > 2 * self.max_connections:  # too many even to say so
            transport.abort()
        elif len(self.connections) > self.max_connections:
            self.refuse(503, "too many connections")
        else:
            self._set_deadline(self.limits.head_deadline)

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        if self.stall:
            self.stall.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.refusal or self.transport.is_closing():
            return
        if self.in_head and not self.deadline:
            self._set_deadline(self.limits.head_deadline)
        self.overhead += len(data)
        super().data_received(data)
        if self.refusal:
            return
        if self.in_head and self.overhead > self.limits.head:
            self.refuse(431, f"the head is longer than {self.limits.head} bytes")
        elif self.overhead > self.limits.head + CHUNK_HEAD * self.limits.chunks:
            self.refuse(413, "the chunks have more framing than data")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.chunks = self.body_bytes = self.head_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self.limits.uri:
            self._stop(414, f"the URI is longer than {self.limits.uri} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self.head_bytes += len(name) + len(value) + 4
        if len(self.headers) > self.limits.head_fields:
            self._stop(431, f"the head has more than {self.limits.head_fields} fields")
        if self.head_bytes > self.limits.head:
            self._stop(431, f"the head is longer than {self.limits.head} bytes")
        if name.lower() == b"transfer-encoding" and value.lower() != b"chunked":
            self._stop(501, "only the transfer coding chunked is known")

    def on_headers_complete(self) -> None:
        self.in_head = False
        self._set_deadline(self.limits.body_deadline)
        if self.parser.get_http_version() == "1.1" and sum(name == b"host" for name, _ in self.headers) != 1:
            self._stop(400, "the head must have one field host")
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        self.chunks += 1
        if self.chunks > self.limits.chunks:
            self._stop(413, f"the body has more than {self.limits.chunks} chunks")

    def on_body(self, body: bytes) -> None:
        self.overhead -= len(body)
        self.body_bytes += len(body)
        if self.body_bytes > self.limits.body:
            self._stop(413, f"the body is longer than {self.limits.body} bytes")
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.in_head = True
        self.overhead = 0
        self._clear_deadline()
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stall = self.loop.call_later(self.limits.write_stall, self._abort_stalled)

    def resume_writing(self) -> None:
        if self.stall:
            self.stall.cancel()
            self.stall = None
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size() > 0:  # closing would wait for a client that does not read
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn when the parser has stopped."""
        refusal = self.refusal or Refused(400, "this is not a valid HTTP/1.1 request")
        self.refuse(refusal.status, str(refusal))

    def refuse(self, status: int, message: str) -> None:
        """Answers with an error and closes the connection; one that is in the middle of an answer just ends."""
        self.refusal = Refused(status, message)
        self._clear_deadline()
        self._unset_keepalive_if_required()
        logger.warning("request refused", extra={"status": status, "reason": message, "client": self.client})
        if self.cycle is not None:
            complete, started = self.cycle.response_complete, self.cycle.response_started
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            # In a head, the cycle is that of the request before.
            if self.pipeline or (not complete if self.in_head else started):
                self.transport.abort()
                return
        retry = "retry-after: 1\r\n" if status == 503 else ""
        body = json.dumps(ApiError(status, message).body()).encode()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n{retry}connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        # A socket that is closed with unread data in it resets the connection, and the client may lose the answer.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER, self.transport.abort)

    def _stop(self, status: int, message: str) -> None:
        self.refusal = Refused(status, message)
        raise self.refusal

    def _set_deadline(self, seconds: float) -> None:
        self._clear_deadline()
        self.deadline = self.loop.call_later(seconds, self._expire)

    def _clear_deadline(self) -> None:
        if self.deadline:
            self.deadline.cancel()
            self.deadline = None

    def _expire(self) -> None:
        self.deadline = None
        part = "head" if self.in_head else "body"
        self.refuse(408, f"the {part} did not arrive in time")

    def _abort_stalled(self) -> None:
        logger.warning("client does not read", extra={"client": self.client})
        self.transport.abort()
