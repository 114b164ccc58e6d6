"""The app: routes, errors, and the bridge to the engine while it runs."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from .. import __version__
from ..model import Mixtral
from . import chat, completions, errors, models, tokens
from .bridge import Bridge
from .served import Served
from .settings import Settings


def create_app(model: Mixtral, settings: Settings | None = None) -> FastAPI:
    """An ASGI app that serves ``model``. One process, one worker: the engine is in it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.served.bridge = Bridge(model, app.state.served.settings.queue)
        try:
            yield
        finally:
            app.state.served.bridge.close()

    # The pages of FastAPI's documentation load scripts from the network; /openapi.json is there.
    app = FastAPI(title="mixtral", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.served = Served(model, settings or Settings())
    errors.install(app)
    for module in (completions, chat, models, tokens):
        app.include_router(module.router)
    return app
