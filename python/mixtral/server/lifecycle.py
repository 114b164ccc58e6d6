"""From loading to the end: what the server is doing, which requests are open, and how each of them ends.

A request ends exactly once: with the application's answer, or with an error that the server decided on, when its
deadline passes, the server shuts down or the engine dies. ``OpenRequests`` sees to that for every ``POST``.
"""

import asyncio
import enum
import json
import logging
from collections.abc import Callable

from .asgi import App, Message, Receive, Scope, Send, header, send_error, send_json
from .errors import ApiError
from .limits import Limits

logger = logging.getLogger("mixtral.server")


class Phase(enum.Enum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class Lifecycle:
    """The phase of the server and its open requests. For the thread of the event loop alone."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.phase = Phase.LOADING
        self.requests: set[OpenRequest] = set()
        self.on_death: Callable[[], None] = lambda: None

    @property
    def ready(self) -> bool:
        return self.phase is Phase.READY

    def loaded(self) -> None:
        if self.phase is Phase.LOADING:
            self.phase = Phase.READY

    def drain(self) -> None:
        if self.phase is not Phase.DEAD:
            self.phase = Phase.DRAINING

    def die(self, reason: str) -> None:
        """The engine is in a state that nobody knows: no request can go on."""
        if self.phase is not Phase.DEAD:
            logger.critical("the engine is dead", extra={"reason": reason})
            self.phase = Phase.DEAD
            self.end_all(ApiError(500, f"the engine stopped: {reason}", code="engine_dead"))
            self.on_death()

    def end_all(self, error: ApiError) -> None:
        for request in self.requests:
            request.end(error)

    async def wait_idle(self, seconds: float) -> bool:
        """Whether all open requests end within that time."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while self.requests and loop.time() < end:
            await asyncio.sleep(0.02)
        return not self.requests

    async def watch(self, progress: Callable[[], tuple[bool, int]], failure: Callable[[], str | None]) -> None:
        """The watchdog: an engine that has failed, or has work and computes nothing, is dead.

        ``progress`` says whether it has work, and how many tokens it has computed; ``failure`` why it takes no more.
        """
        loop = asyncio.get_running_loop()
        last, since = None, loop.time()
        while self.phase is not Phase.DEAD:
            busy, computed = progress()
            if (reason := failure()) is not None:
                self.die(reason)
            elif not busy or computed != last:
                last, since = computed, loop.time()
            elif loop.time() - since > self.limits.watchdog:
                self.die(f"a forward pass took longer than {self.limits.watchdog:g} s")
            await asyncio.sleep(min(1.0, self.limits.watchdog / 4))


class OpenRequest:
    """A request that is being answered by ``task``."""

    def __init__(self, task: asyncio.Task) -> None:
        self.task = task
        self.error: ApiError | None = None

    def end(self, error: ApiError) -> None:
        """Stops the application; the client gets ``error`` in place of what is missing."""
        if self.error is None and not self.task.done():
            self.error = error
            self.task.cancel()


class Answer:
    """What the client has got so far."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = self.stream = self.complete = False

    async def send(self, message: Message) -> None:
        await self._send(message)  # cancelled here, it has sent nothing
        if message["type"] == "http.response.start":
            self.started = True
            kind = header(message, b"content-type") or b""
            self.stream = kind.startswith(b"text/event-stream")
        else:
            self.complete = not message.get("more_body", False)

    async def finish(self, error: ApiError) -> None:
        """Ends the answer with ``error``, once: nothing is added to one that has ended."""
        if not self.started:
            headers = {"retry-after": "1"} if error.status == 503 else {}
            await send_json(self._send, error.status, error.body(), headers)
        elif not self.complete and self.stream:
            event = f"data: {json.dumps(error.body())}\n\n"
            await self._send({"type": "http.response.body", "body": event.encode()})
        elif not self.complete:
            raise error  # half a JSON answer: uvicorn closes the connection


class Health:
    """Middleware: ``/health/live`` (500 when only a restart helps), ``/health/ready`` and ``/health`` (503 unless the
    server takes requests)."""

    def __init__(self, app: App, lifecycle: Lifecycle) -> None:
        self.app = app
        self.lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in ("/health/live", "/health/ready", "/health"):
            await self.app(scope, receive, send)
        elif scope["method"] not in ("GET", "HEAD"):
            await send_error(send, 405, f"{scope['method']} is not allowed here", headers={"allow": "GET, HEAD"})
        else:
            phase = self.lifecycle.phase
            live = scope["path"] == "/health/live"
            status = (500 if phase is Phase.DEAD else 200) if live else (200 if phase is Phase.READY else 503)
            headers = {"retry-after": "5"} if status == 503 else {}
            await send_json(send, status, {"status": phase.value}, headers)


class OpenRequests:
    """Middleware: 503 while the server cannot answer, and a deadline and one end for every ``POST``."""

    def __init__(self, app: App, lifecycle: Lifecycle) -> None:
        self.app = app
        self.lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        phase, post = self.lifecycle.phase, scope["method"] == "POST"
        if phase is not Phase.READY and (post or phase is not Phase.DRAINING):
            headers = {"retry-after": "5", "connection": "close"}
            await send_error(send, 503, f"the server is {phase.value}", code=phase.value, headers=headers)
        elif post:
            await self._answer(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = Answer(send)
        request = OpenRequest(asyncio.ensure_future(self.app(scope, receive, answer.send)))
        deadline = self.lifecycle.limits.request_deadline
        late = ApiError(504, f"the request took longer than {deadline:g} s", code="timeout")
        timer = asyncio.get_running_loop().call_later(deadline, request.end, late)
        self.lifecycle.requests.add(request)
        try:
            await request.task
        except asyncio.CancelledError:
            if request.error is None:  # uvicorn cancels, when it ends
                raise
            await answer.finish(request.error)
        finally:
            timer.cancel()
            self.lifecycle.requests.discard(request)
