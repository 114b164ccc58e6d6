"""Logs: one JSON object a line on stderr, and a request id that ties them together.

What clients wrote is never logged, unless ``--log-prompts`` says so. ``json.dumps`` escapes control characters, so that
no path or header can forge a line.
"""

import json
import logging
import re
import sys
import time
import uuid
from contextvars import ContextVar

from .asgi import App, Message, Receive, Scope, Send, header

logger = logging.getLogger("mixtral.server")

# Of the request that is being answered: what else its line in the log says.
request_fields: ContextVar[dict[str, object] | None] = ContextVar("request_fields", default=None)

USABLE_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}


class JsonFormatter(logging.Formatter):
    """The message, and everything that ``extra=`` brought."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= {name: value for name, value in vars(record).items() if name not in STANDARD}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


def configure(level: str = "info") -> None:
    """Sends the logs of the server and of uvicorn to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("mixtral.server", "uvicorn"):
        target = logging.getLogger(name)
        target.handlers, target.propagate = [handler], False
        target.setLevel(level.upper() if name == "mixtral.server" else logging.ERROR)


class RequestLog:
    """Middleware, the outermost: gives every request an id and logs how it ended.

    The id is the client's ``x-request-id`` if it is a plain word, else a new one; it is in ``request.state.request_id``
    and in the header ``x-request-id`` of the answer. ``request_fields`` are what the application adds to the line.
    """

    def __init__(self, app: App, log_prompts: bool = False) -> None:
        self.app = app
        self.log_prompts = log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = header(scope, b"x-request-id") or b""
        request_id = given.decode() if USABLE_ID.fullmatch(given) else uuid.uuid4().hex
        start = time.monotonic()
        status, complete = 0, False

        async def logged_send(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), (b"x-request-id", request_id.encode())]}
            elif message["type"] == "http.response.body":
                complete = not message.get("more_body", False)
            await send(message)

        async def logged_receive() -> Message:
            message = await receive()
            fields["body"] = str(fields.get("body", "")) + message.get("body", b"").decode(errors="replace")
            return message

        fields: dict[str, object] = {}
        request_fields.set(fields)
        scope.setdefault("state", {})["request_id"] = request_id
        try:
            await self.app(scope, logged_receive if self.log_prompts else receive, logged_send)
        finally:
            quiet = scope["path"].startswith("/health") or scope["path"] == "/metrics"
            logger.log(
                logging.DEBUG if quiet and status < 400 else logging.INFO,
                "request",
                extra={
                    "request_id": request_id,
                    "client": scope["client"][0] if scope.get("client") else None,
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": status,
                    "complete": complete,
                    "seconds": round(time.monotonic() - start, 4),
                    **fields,
                },
            )
