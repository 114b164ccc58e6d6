"""The server around an application without a model: ``stand_in.py '{"limits": {...}, "api_key": ..., "load": 0.0}'``.

``POST /v1/completions {"tokens": N, "interval": S, "pad": BYTES, "stream": BOOL}`` sends N events, S seconds apart.
``POST /stick`` makes the watchdog see an engine that hangs, ``POST /break`` one that has failed.
"""

import asyncio
import json
import sys
import time
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mixtral.server import logs
from mixtral.server.errors import ClientGone
from mixtral.server.lifecycle import Lifecycle
from mixtral.server.limits import Limits
from mixtral.server.run import Server, listen
from mixtral.server.streaming import unless_gone

running = 0  # generations that have begun and not ended
stuck = False
failure = None


async def generate(tokens: int, interval: float, pad: int):
    global running
    running += 1
    try:
        for i in range(tokens):
            await asyncio.sleep(interval)
            yield f"data: {json.dumps({'token': i, 'pad': 'x' * pad})}\n\n"
    finally:
        running -= 1


async def completions(request: Request) -> Response:
    body = json.loads(await request.body())
    events = generate(body.get("tokens", 1), body.get("interval", 0), body.get("pad", 0))
    if body.get("stream"):

        async def stream():
            async for event in events:
                yield event
            yield "data: [DONE]\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")

    async def whole() -> list[str]:
        return [event async for event in events]

    try:
        return JSONResponse(await unless_gone(request.receive, whole()))
    except ClientGone:
        return Response(status_code=499)


async def state(request: Request) -> Response:
    return JSONResponse({"running": running, "request_id": request.state.request_id})


async def stick(request: Request) -> Response:
    global stuck
    stuck = True
    return JSONResponse({})


async def break_down(request: Request) -> Response:
    global failure
    failure = "rank 1 was killed"
    return JSONResponse({})


def main() -> int:
    options = json.loads(sys.argv[1])
    lifecycle = Lifecycle(Limits(**options.get("limits", {})))

    @asynccontextmanager
    async def lifespan(app: Starlette):
        watch = asyncio.create_task(lifecycle.watch(lambda: (stuck, 0), lambda: failure))
        yield
        watch.cancel()

    def load() -> Starlette:
        time.sleep(options.get("load", 0))
        if options.get("broken"):
            raise ValueError("no such model")
        routes = [
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/models", state),
            Route("/stick", stick, methods=["POST"]),
            Route("/break", break_down, methods=["POST"]),
        ]
        return Starlette(routes=routes, lifespan=lifespan)

    logs.configure()
    return Server(lifecycle, options.get("api_key")).serve_on(listen("127.0.0.1", 0), load)


if __name__ == "__main__":
    sys.exit(main())
