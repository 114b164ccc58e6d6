"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}, whatever went wrong."""

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

log = logging.getLogger("mixtral.server")

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """What a client is told.

    Attributes:
        status: the HTTP status.
        message: one sentence, which says what to do; never what another request holds.
        param: the field that is wrong.
        code: for programs, such as "model_not_found".
        headers: of the answer, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, object]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


class ClientGone(Exception):
    """The client closed its connection before the answer was there."""


def install(app: FastAPI) -> None:
    """Makes every error of ``app`` one of ``ApiError``'s form."""

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(ClientGone)
    async def gone(_: Request, __: ClientGone) -> Response:
        return Response(status_code=499)  # nobody reads it; the log does

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return refused(error.errors()[0]).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error.__cause__, ApiError):  # of reading the body: FastAPI has put its own words in front
            return error.__cause__.response()
        known = {404: f"there is no {request.url.path} here", 405: f"{request.method} is not allowed here"}
        message = known.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        log.error("a request failed: %s", type(error).__name__, exc_info=error)
        return ApiError(500, "the server failed at this request", code="internal_error").response()


def refused(problem: dict) -> ApiError:
    """The error of a body that does not fit its model; ``problem`` is one of pydantic's."""
    place = [str(part) for part in problem["loc"] if part != "body"]
    param = place[0] if place else None
    if problem["type"] == "extra_forbidden":
        name = ".".join(place)
        return ApiError(400, f"{name} is not supported", name, "unsupported_parameter")
    message = problem["msg"].removeprefix("Value error, ")
    if param is None and problem["type"] in ("model_attributes_type", "missing"):
        message = "the body must be a JSON object"
    return ApiError(400, f"{param}: {message}" if param else message, param, "invalid_value")
