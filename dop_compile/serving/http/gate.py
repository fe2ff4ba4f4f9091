"""What every request passes before the application sees it, and every response after.

1. The name by which the server is addressed has to be one of its own: a page of another site that lets its name point
   to this machine is kept out, as browsers send the name that they were told.
2. The API key, where there is one, in constant time, for everything but the pages without content of anyone's.
3. Headers for browsers. No other site may read answers: there is no CORS, and bodies have to be JSON, which a browser
   does not send elsewhere without asking first.
4. Whatever the application raises becomes an error in OpenAI's shape, and of what was raised only the place is logged.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dop_compile.serving.http.errors import ApiError, failed, shutting_down
from dop_compile.serving.scheduler import report

__all__ = ["LOOPBACK", "Gate"]

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
BEARER = b"bearer "


class Gate:
    """Around an application.

    Args:
        key: None: no key is asked for.
        hosts: None: any name.
        open_paths: for which no key is asked for.
    """

    def __init__(self, app: ASGIApp, key: str | None, hosts: frozenset[str] | None, open_paths: Collection[str]):
        self._app, self._hosts, self._open = app, hosts, frozenset(open_paths)
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            return
        except (Exception, asyncio.CancelledError) as error:
            answer = _answer(error)
            if not started:  # else the client sees a connection that ends early
                await answer.response()(scope, receive, send_with_headers)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._hosts is not None and _name(headers.get("host", "")) not in self._hosts:
            raise ApiError(421, "the server is not known by this name; give it with --allow-host", code="unknown_host")
        if self._key is not None and scope["path"] not in self._open:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            is_bearer = given[: len(BEARER)].lower() == BEARER
            if not hmac.compare_digest(given[len(BEARER) :] if is_bearer else b"", self._key):
                message = "a valid API key is needed (Authorization: Bearer KEY)"
                raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _answer(error: BaseException) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, asyncio.CancelledError):  # the server ends, and its grace is over
        return shutting_down()
    report("a request failed", error)
    return failed()


def _name(host: str) -> str:
    """The host of a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].rstrip(".").lower()
