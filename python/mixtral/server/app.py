"""The app: routes, errors, and the bridge to the engine while it runs."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI

from .. import _C, __version__
from ..model import Mixtral
from . import chat, completions, errors, metrics, models, routing, tokens
from .bridge import Bridge
from .lifecycle import Lifecycle
from .metrics import Metrics
from .recorder import Recorder
from .served import Served
from .settings import Settings


def create_app(
    model: Mixtral,
    settings: Settings | None = None,
    lifecycle: Lifecycle | None = None,
    bridge: Callable[[Mixtral, Metrics], Bridge] = Bridge,
) -> FastAPI:
    """An ASGI app that serves ``model``. One process, one worker: the engine is in it. Requests beyond the model's
    ``max_queue`` get 429; several apps of one model share its places.

    ``lifecycle``: of the server around it (``run.Server``), which is told when the engine hangs or fails. ``bridge``:
    makes the way to the engine, of the model and the metrics; tests have others.

    Raises:
        ValueError: a trace that cannot be written.
        LoadError: a trace to replay that cannot be read, or that is of another model.
    """
    settings = settings or Settings()
    recorder = Recorder(model, settings.trace) if settings.trace else None
    replays = _C.Replays(settings.replay, model._model) if settings.replay else None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        served = app.state.served
        served.bridge = bridge(model, served.metrics)
        served.bridge.recorder, served.bridge.replays = recorder, replays
        watch = None
        if lifecycle:
            served.bridge.on_failure = lifecycle.die
            watch = asyncio.create_task(lifecycle.watch(served.bridge.progress, served.bridge.failure))
        try:
            yield
        finally:
            if watch:
                watch.cancel()
            served.bridge.close()
            if recorder:
                recorder.save()

    # The pages of FastAPI's documentation load scripts from the network; /openapi.json is there.
    app = FastAPI(title="mixtral", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.served = Served(model, settings)
    errors.install(app)
    for module in (completions, chat, models, tokens, routing, metrics):
        app.include_router(module.router)
    return app
