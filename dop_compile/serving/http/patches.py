"""/v1/chat/patches: which patches of its pictures each layer still reads, for the same body as a request for text."""

from __future__ import annotations

import asyncio
import dataclasses

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dop_compile.serving.http.chat import unless_gone
from dop_compile.serving.http.errors import as_api_error, busy, invalid
from dop_compile.serving.http.reading import Reader
from dop_compile.serving.patches import PatchView, ShowsPatches
from dop_compile.serving.requests import Prepared, RequestError
from dop_compile.serving.scheduler import Closed, Scheduler

__all__ = ["Patches"]

AT_ONCE = 2
"""Of these requests; they do not wait in the queue, and each costs the others a prefill."""


class Patches:
    """Asks the engine between its steps."""

    def __init__(self, scheduler: Scheduler, reader: Reader):
        self._scheduler, self._reader = scheduler, reader
        self._room = AT_ONCE

    async def show(self, request: Request) -> Response:
        """As a `PatchView`, with the tier.

        Raises:
            ApiError: the request is wrong, has no pictures, or the engine cannot tell.
            ClientDisconnect: the client has gone.
        """
        engine = self._scheduler.engine
        if not isinstance(engine, ShowsPatches):
            raise invalid("this server's engine does not tell which patches are read", code="not_supported")
        if self._room < 1:
            raise busy(1)
        self._room -= 1
        try:
            prepared = (await self._reader.read(request)).prepared
            try:
                view = await unless_gone(request, self._ask(engine, prepared))
            except (RequestError, Closed) as error:
                raise as_api_error(error) from None
        finally:
            self._room += 1
        return JSONResponse({"tier": prepared.tier, **dataclasses.asdict(view)})

    async def _ask(self, engine: ShowsPatches, prepared: Prepared) -> PatchView:
        return await asyncio.wrap_future(self._scheduler.call(lambda: engine.patches(prepared)))
