"""One request between HTTP, which is asynchronous, and the scheduler's thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dop_compile.serving.http.answers import Answer
from dop_compile.serving.http.errors import as_api_error
from dop_compile.serving.requests import Event, Prepared
from dop_compile.serving.scheduler import Closed, Outcome, QueueFull, Scheduler

__all__ = ["Exchange"]

CANCELLED = "cancelled"


class Exchange:
    """A submitted request, whose events are awaited.

    Args:
        answer: is told of every event.
        ended: called once, with how it ended: the finish reason, an error's code, or "cancelled".

    Raises:
        ApiError: the scheduler does not take it.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        prepared: Prepared,
        answer: Answer,
        ended: Callable[[str], None],
        *,
        queue_seconds: float,
        request_seconds: float,
    ):
        self.answer = answer
        self._scheduler, self._ended = scheduler, ended
        self._open = True
        self._loop = asyncio.get_running_loop()
        self._outcomes: asyncio.Queue[Outcome] = asyncio.Queue()
        try:
            self._ticket = scheduler.submit(
                prepared, self._deliver, queue_seconds=queue_seconds, request_seconds=request_seconds
            )
        except (QueueFull, Closed) as error:
            raise as_api_error(error) from None

    def _deliver(self, outcome: Outcome) -> None:
        self._loop.call_soon_threadsafe(self._outcomes.put_nowait, outcome)

    async def next(self) -> Event:
        """The next event; the one with a finish reason is the last.

        Raises:
            ApiError: there are no more, since the request failed.
        """
        outcome = await self._outcomes.get()
        if isinstance(outcome, Exception):
            error = as_api_error(outcome)
            self.close(error.code or "refused")
            raise error
        self.answer.add(outcome.text, outcome.tokens)
        if outcome.finish is not None:
            self.close(outcome.finish)
        return outcome

    def close(self, how: str = CANCELLED) -> None:
        """Nothing more is awaited; the first call counts."""
        if self._open:
            self._open = False
            self._scheduler.cancel(self._ticket)
            self._ended(how)
