"""A response of server-sent events that ends when the client goes, whatever is being waited for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

__all__ = ["EventStream", "until_gone"]

SEND_SECONDS = 30.0
"""For a client that does not read: one piece, and then it is given up."""


async def until_gone(receive: Receive) -> None:
    """Return when the client has closed the connection; the body has been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends pieces as they come.

    Args:
        pieces: events, encoded.
        close: called at the end, however it comes.
    """

    def __init__(self, pieces: AsyncIterator[str], close: Callable[[], None]):
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._pieces, self._close = pieces, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(until_gone(receive))
        body = asyncio.ensure_future(self._send(send))
        try:
            await asyncio.wait({gone, body}, return_when=asyncio.FIRST_COMPLETED)
            if body.done():
                body.result()
        finally:
            self._close()
            for task in (gone, body):
                task.cancel()
                with contextlib.suppress(Exception, asyncio.CancelledError):
                    await task

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for piece in self._pieces:
            await self._within(send, {"type": "http.response.body", "body": piece.encode(), "more_body": True})
        await self._within(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _within(self, send: Send, message: dict[str, Any]) -> None:
        async with asyncio.timeout(SEND_SECONDS):
            await send(message)
