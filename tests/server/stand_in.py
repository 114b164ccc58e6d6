"""The server around an application without a model: ``stand_in.py '{"limits": {...}, "api_key": ..., "load": 0.0}'``.

``POST /v1/completions {"max_tokens": N, "interval": S, "stream": BOOL}`` sends N events, S seconds apart (0.01 by
default), each with as many bytes more as the option ``"pad"`` says. ``GET /metrics`` says how many generations run.
``POST /stick`` makes the watchdog see an engine that hangs, ``POST /break`` one that has failed.
"""

import asyncio
import json
import sys
import time
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from mixtral.server import logs
from mixtral.server.errors import ClientGone
from mixtral.server.lifecycle import Lifecycle
from mixtral.server.limits import Limits
from mixtral.server.run import Server, listen
from mixtral.server.streaming import unless_gone

OPTIONS = json.loads(sys.argv[1])
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
    events = generate(body.get("max_tokens", 1), body.get("interval", 0.01), OPTIONS.get("pad", 0))
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


async def models(request: Request) -> Response:
    return JSONResponse({"data": []})


async def metrics(request: Request) -> Response:
    return PlainTextResponse(f"mixtral:num_requests_running{{}} {running}\n")


async def stick(request: Request) -> Response:
    global stuck
    stuck = True
    return JSONResponse({})


async def break_down(request: Request) -> Response:
    global failure
    failure = "rank 1 was killed"
    return JSONResponse({})


def main() -> int:
    lifecycle = Lifecycle(Limits(**OPTIONS.get("limits", {})))

    @asynccontextmanager
    async def lifespan(app: Starlette):
        watch = asyncio.create_task(lifecycle.watch(lambda: (stuck, 0), lambda: failure))
        yield
        watch.cancel()

    def load() -> Starlette:
        time.sleep(OPTIONS.get("load", 0))
        if OPTIONS.get("broken"):
            raise ValueError("no such model")
        routes = [
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/models", models),
            Route("/metrics", metrics),
            Route("/stick", stick, methods=["POST"]),
            Route("/break", break_down, methods=["POST"]),
        ]
        return Starlette(routes=routes, lifespan=lifespan)

    logs.configure()
    return Server(lifecycle, OPTIONS.get("api_key")).serve_on(listen("127.0.0.1", 0), load)


if __name__ == "__main__":
    sys.exit(main())
