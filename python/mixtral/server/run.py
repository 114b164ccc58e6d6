"""The process of the server: its socket, its signals, and its exit status."""

import asyncio
import functools
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager

import uvicorn
from starlette.applications import Starlette

from .asgi import App, Receive, Scope, Send
from .auth import ApiKey
from .body import JsonOnly
from .errors import ApiError
from .lifecycle import Health, Lifecycle, OpenRequests, Phase
from .limits import LimitedProtocol
from .logs import RequestLog

logger = logging.getLogger("mixtral.server")

LAST_WORDS = 1.0  # seconds for the terminal events when the server ends at once
DEAD = 5  # exit status


def listen(host: str, port: int) -> socket.socket:
    """Raises ValueError that names the address."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: cannot listen there: {error.strerror or error}") from None


class Operated:
    """The app that uvicorn runs: the middleware, and behind it the application once it is there."""

    def __init__(self, lifecycle: Lifecycle, api_key: str | None, log_prompts: bool) -> None:
        self.application: App | None = None
        self._lifespan = AsyncExitStack()
        app: App = OpenRequests(self._forward, lifecycle)  # lets nothing through before there is an application
        app = JsonOnly(app)
        app = Health(app, lifecycle)
        app = ApiKey(app, api_key)
        self._app = RequestLog(app, log_prompts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    async def start(self, application: Starlette) -> None:
        await self._lifespan.enter_async_context(application.router.lifespan_context(application))
        self.application = application

    async def stop(self) -> None:
        await self._lifespan.aclose()

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.application(scope, receive, send)


class Server(uvicorn.Server):
    """Serves until a signal or the death of the engine.

    The first SIGTERM or SIGINT drains: no new requests, and exit status 0 when the open ones end in time. A second one,
    or the end of that time, ends them with an error, and the status is that of the signal.
    """

    def __init__(self, lifecycle: Lifecycle, api_key: str | None = None, log_prompts: bool = False) -> None:
        self.app = Operated(lifecycle, api_key, log_prompts)
        super().__init__(
            uvicorn.Config(
                self.app,
                http=functools.partial(LimitedProtocol, limits=lifecycle.limits),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=lifecycle.limits.idle,
                timeout_graceful_shutdown=LAST_WORDS,
            )
        )
        self.lifecycle = lifecycle
        self.status = 0
        self._signals = 0
        self._failure: BaseException | None = None
        self._tasks: set[asyncio.Task] = set()

    def serve_on(
        self, sock: socket.socket, load: Callable[[], Starlette], on_ready: Callable[[str], None] | None = None
    ) -> int:
        """Returns the exit status.

        Args:
            load: returns the application. It runs on a thread of its own, and the health routes answer meanwhile.
            on_ready: called with the URL when the application answers.

        Raises:
            Exception: what ``load`` raised.
        """
        self._load, self._on_ready = load, on_ready
        host, port = sock.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self.run(sockets=[sock])
        if self._failure:
            raise self._failure
        if self.lifecycle.phase is Phase.DEAD:  # its thread may never end, so nobody can wait for it
            logging.shutdown()
            os._exit(DEAD)
        return self.status

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        for sig in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(sig, self._on_signal, sig)
        self.lifecycle.on_death = lambda: self._spawn(self._end())
        logger.info("listening", extra={"url": self.url})
        threading.Thread(target=self._load_application, name="load", daemon=True).start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        await self.app.stop()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # ``startup`` has put other handlers in place of uvicorn's

    def _load_application(self) -> None:
        try:
            application = self._load()
        except BaseException as error:  # raised again by serve_on
            self._failure = error
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._spawn, self._start(application))

    async def _start(self, application: Starlette) -> None:
        await self.app.start(application)
        self.lifecycle.loaded()
        logger.info("ready", extra={"url": self.url})
        if self._on_ready:
            self._on_ready(self.url)

    def _on_signal(self, sig: signal.Signals) -> None:
        self._signals += 1
        logger.info("signal", extra={"signal": sig.name, "open_requests": len(self.lifecycle.requests)})
        if self.lifecycle.phase is Phase.LOADING:  # nothing to lose, and the loader cannot be interrupted
            logging.shutdown()
            os._exit(128 + sig)
        if self._signals == 1:
            self.lifecycle.drain()
            self._spawn(self._drain(sig))
        else:
            self.status = 128 + sig
            self._spawn(self._end())

    async def _drain(self, sig: signal.Signals) -> None:
        if not await self.lifecycle.wait_idle(self.lifecycle.limits.drain):
            self.status = 128 + sig
        await self._end()

    async def _end(self) -> None:
        self.lifecycle.end_all(ApiError(503, "the server is shutting down", code="shutting_down"))
        await self.lifecycle.wait_idle(LAST_WORDS)
        self.should_exit = True

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
