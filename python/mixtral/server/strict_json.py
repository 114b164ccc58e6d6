"""Bodies are read more strictly than Python's json module does: what two readers could take differently is refused."""

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from .errors import ApiError

MAX_DEPTH = 64


def loads(text: bytes) -> object:
    """The value of a JSON text.

    Raises:
        ApiError: 400 for no JSON, a key that comes twice, NaN and Infinity, a number beyond a float's range, half a
            surrogate pair, or more than 64 levels.
    """
    try:
        _check_depth(text)
        value = json.loads(
            text.decode("utf-8"), object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_float
        )
        _check_text(value)
    except UnicodeError:
        raise ApiError(400, "the body must be UTF-8", code="invalid_json") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body must be JSON: {error}", code="invalid_json") from None
    return value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:64]!r} comes twice")
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:32]} is beyond the range of a float")
    return value


def _check_depth(text: bytes) -> None:
    depth, in_string, escaped = 0, False, False
    if text.count(b"[") + text.count(b"{") <= MAX_DEPTH:
        return
    for byte in text:
        if in_string:
            in_string = escaped or byte != 0x22
            escaped = byte == 0x5C and not escaped
        elif byte == 0x22:
            in_string = True
        elif byte in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"it has more than {MAX_DEPTH} levels")
        elif byte in b"]}":
            depth -= 1


def _check_text(value: object) -> None:
    if isinstance(value, str):
        value.encode()  # half a surrogate pair is no text
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_text(name)
            _check_text(item)
    elif isinstance(value, list):
        for item in value:
            _check_text(item)


class StrictRequest(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_strict"):
            self._strict = loads(await self.body())
        return self._strict


class StrictRoute(APIRoute):
    """A route whose body is JSON, read by ``loads``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if request.method == "POST" and kind != "application/json":
                raise ApiError(415, f"send the body with Content-Type: application/json, got {kind or 'none'}")
            return await handler(StrictRequest(request.scope, request.receive))

        return strict
