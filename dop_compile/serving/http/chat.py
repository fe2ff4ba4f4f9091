"""/v1/chat/completions: a request is read, waits, runs, and is answered at once or piece by piece.

The first event is awaited before anything is sent, so that what fails until then has a status of its own. A client that
goes, wherever its request is, takes the request with it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from dop_compile.serving.http.answers import DONE, Answer, sse
from dop_compile.serving.http.errors import ApiError, busy, shutting_down
from dop_compile.serving.http.exchange import Exchange
from dop_compile.serving.http.metrics import Metrics
from dop_compile.serving.http.names import ModelIds
from dop_compile.serving.http.reading import Asked, Reader
from dop_compile.serving.http.settings import Settings
from dop_compile.serving.http.streams import EventStream, until_gone
from dop_compile.serving.requests import Event
from dop_compile.serving.scheduler import Scheduler

__all__ = ["Chat", "unless_gone"]

_Result = TypeVar("_Result")


class Chat:
    """Answers requests on a scheduler."""

    def __init__(self, scheduler: Scheduler, reader: Reader, settings: Settings, ids: ModelIds, metrics: Metrics):
        self._scheduler, self._reader = scheduler, reader
        self._settings, self._ids, self._metrics = settings, ids, metrics
        self._room = settings.queue + scheduler.engine.max_batch

    async def complete(self, request: Request) -> Response:
        """The next message of a conversation.

        Raises:
            ApiError: the request is wrong, or there is no room.
            ClientDisconnect: the client has gone.
        """
        try:
            exchange, asked = await self._begin(request)
        except ApiError as error:
            self._metrics.refused.labels(error.status).inc()
            raise
        try:
            first = await unless_gone(request, exchange.next())
            if asked.chat.stream:
                pieces = _pieces(exchange, first, asked.chat.includes_usage)
                return EventStream(pieces, exchange.close)
            finish = await unless_gone(request, _last(exchange, first))
        except BaseException:
            exchange.close()
            raise
        return JSONResponse(exchange.answer.whole(finish))

    async def _begin(self, request: Request) -> tuple[Exchange, Asked]:
        """A request that waits for its turn; it takes its room before its body is read."""
        if not self._scheduler.accepts:
            raise shutting_down()
        if self._room < 1:
            raise busy(self._scheduler.seconds_until_room)
        self._room -= 1
        try:
            asked = await self._reader.read(request)
            prepared = asked.prepared
            answer = Answer(self._ids.of_tier(prepared.tier), prepared.tier, prepared.prompt_tokens, asked.started)
            exchange = Exchange(
                self._scheduler,
                prepared,
                answer,
                lambda how: self._ended(answer, how),
                queue_seconds=self._settings.queue_seconds,
                request_seconds=self._settings.request_seconds,
            )
        except BaseException:
            self._room += 1
            raise
        return exchange, asked

    def _ended(self, answer: Answer, how: str) -> None:
        self._room += 1
        self._metrics.count(answer, how)


async def unless_gone(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of some work, which stops when the client goes.

    Raises:
        ClientDisconnect: it has gone.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(until_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await gone


async def _last(exchange: Exchange, event: Event) -> str:
    """Wait for the end; returns why the text ended."""
    while event.finish is None:
        event = await exchange.next()
    return event.finish


async def _pieces(exchange: Exchange, event: Event, usage: bool) -> AsyncIterator[str]:
    answer = exchange.answer
    yield sse(answer.chunk({"role": "assistant", "content": ""}))
    try:
        while True:
            if event.text:
                yield sse(answer.chunk({"content": event.text}))
            if event.finish is not None:
                break
            event = await exchange.next()
    except ApiError as error:
        yield sse(error.body)
        return
    yield sse(answer.chunk({}, event.finish))
    if usage:
        yield sse(answer.usage_chunk())
    yield DONE
