"""Errors as clients of OpenAI's API know them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from dop_compile.serving.requests import RequestError
from dop_compile.serving.scheduler import Closed, QueueFull, TooLate

__all__ = ["ApiError", "as_api_error", "busy", "failed", "invalid", "late", "shutting_down"]

INVALID, RATE, SERVER, TIMEOUT = "invalid_request_error", "rate_limit_error", "server_error", "timeout_error"


class ApiError(Exception):
    """What a request is answered with instead of text.

    Args:
        status: of HTTP.
        message: for the client.
        kind, code: OpenAI's `type` and `code`.
        param: the field of the request that is wrong, such as `messages[0].content`.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def invalid(message: str, param: str | None = None, code: str | None = None, status: int = 400) -> ApiError:
    """The request is wrong."""
    return ApiError(status, message, code=code, param=param)


def busy(seconds: int) -> ApiError:
    """There is no room for the request now."""
    message = f"the server has as many requests as it takes; try again in {seconds} s"
    return ApiError(429, message, kind=RATE, code="queue_full", headers={"Retry-After": str(seconds)})


def late(message: str, status: int) -> ApiError:
    """A request, or its answer, took longer than the server allows."""
    headers = {"Retry-After": "5"} if status == 503 else {}
    return ApiError(status, message, kind=TIMEOUT, code="timeout", headers=headers)


def shutting_down() -> ApiError:
    """The server takes no more requests."""
    return ApiError(503, "the server is shutting down", kind=SERVER, code="unavailable", headers={"Retry-After": "10"})


def failed() -> ApiError:
    """Something that is not the request's fault; what it was is the server's to know."""
    return ApiError(500, "the server failed to answer this request", kind=SERVER, code="internal_error")


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of something that an engine or a scheduler says."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return invalid(str(error))
    if isinstance(error, QueueFull):
        return busy(error.seconds)
    if isinstance(error, TooLate):
        return late(str(error), 504 if error.running else 503)
    return shutting_down() if isinstance(error, Closed) else failed()
