"""The whole server around the small model: ``small_server.py '{"limits": {...}, "model": {"max_queue": 16, ...}}'``.

``"breaks_after": N``: the engine seems to have failed from the (N + 1)th wake-up on.

``POST /hold`` stops the engine's thread in the middle of its work, until ``POST /release``.
"""

import asyncio
import json
import sys
import threading

from fastapi import FastAPI

import mixtral
from mixtral import _C
from mixtral.server import logs
from mixtral.server.app import create_app
from mixtral.server.bridge import Bridge
from mixtral.server.lifecycle import Lifecycle
from mixtral.server.limits import Limits
from mixtral.server.run import Server, listen
from mixtral.server.settings import Settings
from running import small_model


class BreakingBridge(Bridge):
    left = 0  # wake-ups

    def _drain(self) -> None:
        self.left -= 1
        super()._drain()

    def failure(self) -> str | None:
        return "rank 1 was killed" if self.left < 0 else None


def add_hold(app: FastAPI, model: mixtral.Mixtral) -> None:
    go_on = threading.Event()

    @app.post("/hold")
    async def hold() -> dict:
        held = threading.Event()

        def stop(_: str) -> bool:  # on the engine's thread
            held.set()
            return go_on.wait()

        params = _C.SamplingParams(max_tokens=1, ignore_eos=True)
        model.engine.submit([5], params, 0, stop, lambda _: None)
        await asyncio.to_thread(held.wait)
        return {}

    @app.post("/release")
    async def release() -> dict:
        go_on.set()
        return {}


def main() -> int:
    options = json.loads(sys.argv[1])
    lifecycle = Lifecycle(Limits(**options.get("limits", {})))

    def load() -> FastAPI:
        model = small_model(**{"max_queue": 256, **options.get("model", {})})
        BreakingBridge.left = options.get("breaks_after", 0)
        bridge = BreakingBridge if "breaks_after" in options else Bridge
        app = create_app(model, Settings(served_model_name="small"), lifecycle, bridge)
        add_hold(app, model)
        return app

    logs.configure()
    return Server(lifecycle, options.get("api_key")).serve_on(listen("127.0.0.1", options.get("port", 0)), load)


if __name__ == "__main__":
    sys.exit(main())
