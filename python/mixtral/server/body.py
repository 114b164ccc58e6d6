"""Bodies are JSON as it is: anything else is refused before it is read.

Asking for the content type also keeps web pages of other origins out: a browser sends JSON across origins only when the
server allows it.
"""

from .asgi import App, Receive, Scope, Send, header, send_error


class JsonOnly:
    """Middleware: 415 for a body that does not say it is JSON, or that is compressed."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _has_body(scope):
            if (header(scope, b"content-encoding") or b"identity").lower() != b"identity":
                await send_error(send, 415, "a content-encoding is not supported: send the body as it is")
                return
            kind = (header(scope, b"content-type") or b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":
                await send_error(send, 415, "the body needs the header content-type: application/json")
                return
        await self.app(scope, receive, send)


def _has_body(scope: Scope) -> bool:
    return header(scope, b"transfer-encoding") is not None or (header(scope, b"content-length") or b"0") != b"0"
