"""The API key: every route asks for it but the two that an orchestrator probes."""

import base64
import binascii
import hashlib
import hmac

from .asgi import App, Receive, Scope, Send, header, send_error

OPEN_PATHS = frozenset({"/health/live", "/health/ready"})


class ApiKey:
    """Middleware: 401 without ``Authorization: Bearer KEY``.

    ``Basic`` with the key as password is the same: it is how a browser, which asks for it, opens the page at ``/``.
    """

    def __init__(self, app: App, key: str | None) -> None:
        self.app = app
        self.digest = hashlib.sha256(key.encode()).digest() if key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self.digest is None or scope["path"] in OPEN_PATHS or self._known(scope):
            await self.app(scope, receive, send)
            return
        challenge = 'Basic realm="mixtral"' if scope["path"] == "/" else "Bearer"
        await send_error(
            send, 401, "wrong or missing API key", code="invalid_api_key", headers={"www-authenticate": challenge}
        )

    def _known(self, scope: Scope) -> bool:
        scheme, _, value = (header(scope, b"authorization") or b"").partition(b" ")
        if scheme.lower() == b"basic":
            try:
                value = base64.b64decode(value, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != b"bearer":
            return False
        # Digests have one length, so the comparison takes the same time whatever the client sent.
        return hmac.compare_digest(hashlib.sha256(value.strip()).digest(), self.digest)
