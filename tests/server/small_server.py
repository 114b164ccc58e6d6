"""The whole server around the small model: ``small_server.py '{"limits": {...}, "queue": 256, "model": {...}}'``.

``"breaks_after": N``: the engine seems to have failed from the (N + 1)th wake-up on.
"""

import json
import sys

from fastapi import FastAPI

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


def main() -> int:
    options = json.loads(sys.argv[1])
    lifecycle = Lifecycle(Limits(**options.get("limits", {})))

    def load() -> FastAPI:
        settings = Settings(served_model_name="small", queue=options.get("queue", 256))
        BreakingBridge.left = options.get("breaks_after", 0)
        bridge = BreakingBridge if "breaks_after" in options else Bridge
        return create_app(small_model(**options.get("model", {})), settings, lifecycle, bridge)

    logs.configure()
    return Server(lifecycle, options.get("api_key")).serve_on(listen("127.0.0.1", options.get("port", 0)), load)


if __name__ == "__main__":
    sys.exit(main())
