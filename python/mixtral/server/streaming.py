"""Server-sent events, and what to do when the client goes away."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError, ClientGone, log

try:
    import orjson

    def to_json(value: object) -> bytes:
        return orjson.dumps(value)

except ImportError:

    def to_json(value: object) -> bytes:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def json_response(value: object) -> Response:
    return Response(to_json(value), media_type="application/json")


T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
# Of a route, for /openapi.json: an answer is one object or a stream.
ONE_OR_STREAM = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}


def event(value: object) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled when the client goes.

    Raises:
        ClientGone: it went.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await each


class EventStream(Response):
    """An answer of server-sent events. It ends with [DONE], or with one event that holds an error.

    ``close`` is called once, however it ends.
    """

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send_all(send))
        except (ClientGone, OSError):
            pass  # nobody reads any more
        finally:
            self._close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for chunk in self._events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            last = DONE
        except ApiError as error:
            last = event(error.body())
        except OSError:
            raise
        except Exception as error:
            log.error("a stream failed: %s", type(error).__name__, exc_info=error)
            last = event(ApiError(500, "the server failed at this request", code="internal_error").body())
        await send({"type": "http.response.body", "body": last, "more_body": False})


async def answer(request: Request, work: Awaitable[T], close: Callable[[], None]) -> T:
    """The result of ``work`` for a client that waits for all of it; ``close`` is called however it ends."""
    try:
        return await unless_gone(request.receive, work)
    finally:
        close()
