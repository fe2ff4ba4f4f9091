"""Requests of many clients on one engine: one thread that admits, steps, cancels and gives up.

    submit (any thread) -> waiting, first come first served -> engine.admit -> engine.step ... -> last event
                                 \\ too many: QueueFull              \\ cancelled, too late, failed

Requests join and leave the engine between its steps. Each is told of its events, and of what ended it, by the function
that came with it, called on the scheduler's thread.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dop_compile.serving.requests import Engine, Event, Prepared, RequestError

__all__ = ["Closed", "EngineFailure", "Outcome", "QueueFull", "Scheduler", "Ticket", "TooLate", "report"]

log = logging.getLogger(__name__)

MOST_SECONDS = 60
"""That a client is told to wait for at most."""
WEIGHT = 0.2
"""Of the newest request in the running mean of how long one takes."""

_Result = TypeVar("_Result")


class QueueFull(Exception):
    """As many requests wait as may. `seconds`: after which there may be room."""

    def __init__(self, seconds: int):
        super().__init__(f"the queue is full; try again in {seconds} s")
        self.seconds = seconds


class Closed(Exception):
    """No more requests are taken, and those that wait are not begun."""


class TooLate(Exception):
    """A request was not begun, or not finished, in its time. `running`: whether it had been begun."""

    def __init__(self, running: bool):
        super().__init__("the request was not finished in time" if running else "the request waited too long")
        self.running = running


class EngineFailure(Exception):
    """The engine failed while it worked on a request."""


Outcome = Event | Exception
"""What a request is told: its events, or one of the errors above or a `RequestError`, which is the last."""


@dataclass(eq=False)
class Ticket:
    """One submitted request.

    Args:
        prepared: by the engine.
        deliver: is told of each outcome, on the scheduler's thread.
        begin_by, finish_by: times of the scheduler's clock.
        submitted: when.
        id: the engine's, while it runs.
        begun: when the engine admitted it.
    """

    prepared: Prepared
    deliver: Callable[[Outcome], None]
    begin_by: float
    finish_by: float
    submitted: float
    id: int | None = None
    begun: float | None = None
    cancelled: bool = field(default=False, compare=False)


class Scheduler:
    """Runs an engine on a thread of its own.

    Args:
        engine: is used on that thread alone from `start` on, but for `prepare`; closed at the end.
        queue: requests that wait at most, besides those that the engine has room for.
        clock: seconds, for tests.
    """

    def __init__(self, engine: Engine, *, queue: int, clock: Callable[[], float] = time.monotonic):
        self.engine = engine
        self._queue, self._clock = queue, clock
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._running: dict[int, Ticket] = {}
        self._tasks: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._draining = self._broken = False
        self._mean_seconds = 1.0
        self._thread = threading.Thread(target=self._run, name="dop_compile engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    # --- from any thread ------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def accepts(self) -> bool:
        """Whether requests are taken at all."""
        return self._thread.is_alive() and not (self._draining or self._broken)

    @property
    def is_broken(self) -> bool:
        """Whether the engine has failed in a way that it does not recover from."""
        return self._broken

    @property
    def seconds_until_room(self) -> int:
        """A guess, for those that are turned away."""
        turns = (len(self._waiting) + len(self._running)) / max(self.engine.max_batch, 1)
        return max(1, min(MOST_SECONDS, math.ceil(turns * self._mean_seconds)))

    def submit(
        self, prepared: Prepared, deliver: Callable[[Outcome], None], *, queue_seconds: float, request_seconds: float
    ) -> Ticket:
        """Let a request wait for its turn.

        Raises:
            QueueFull: too many wait already.
            Closed: no requests are taken any more.
        """
        with self._changed:
            if not self.accepts:
                raise Closed
            # Of those that wait, some may begin with the engine's next step
            if len(self._waiting) + len(self._running) >= self._queue + self.engine.max_batch:
                raise QueueFull(self.seconds_until_room)
            now = self._clock()
            ticket = Ticket(prepared, deliver, now + queue_seconds, now + request_seconds, now)
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody wants the rest of a request; it is told nothing more. Of an ended one: nothing happens."""
        with self._changed:
            ticket.cancelled = True
            self._changed.notify_all()

    def call(self, function: Callable[[], _Result]) -> Future[_Result]:
        """Run something on the engine's thread, between two steps.

        Raises:
            Closed: the thread takes nothing more.
        """
        future: Future[_Result] = Future()
        with self._changed:
            if not self.accepts:
                raise Closed
            self._tasks.append((future, function))
            self._changed.notify_all()
        return future

    def drain(self) -> None:
        """Take no more requests, tell those that wait that it is too late, and end when those that run are finished."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    def join(self, seconds: float | None = None) -> bool:
        """Wait for the end after `drain`; False if it has not come."""
        if self._thread.ident is not None:
            self._thread.join(seconds)
        return not self._thread.is_alive()

    # --- the engine's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._await_work():
                self._run_tasks()
                self._drop_cancelled()
                self._expire()
                self._admit()
                self._step()
        except BaseException as error:  # nobody else sees what a thread ends with
            self._broken = True
            report("the engine's thread has ended", error)
        finally:
            self._end()

    def _await_work(self) -> bool:
        """Wait until there is something to do; False when there will be nothing any more."""
        with self._changed:
            while not (self._waiting or self._running or self._tasks):
                if self._draining or self._broken:
                    return False
                self._changed.wait()
            if self._draining or self._broken:
                refused, self._waiting = self._waiting, deque()
            else:
                refused = deque()
        for ticket in refused:
            self._tell(ticket, Closed())
        return not self._broken

    def _run_tasks(self) -> None:
        while self._tasks:
            future, function = self._tasks.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)

    def _drop_cancelled(self) -> None:
        with self._changed:
            self._waiting = deque(ticket for ticket in self._waiting if not ticket.cancelled)
        for ticket in [ticket for ticket in self._running.values() if ticket.cancelled]:
            self._leave(ticket)

    def _expire(self) -> None:
        now = self._clock()
        with self._changed:
            late = [ticket for ticket in self._waiting if min(ticket.begin_by, ticket.finish_by) <= now]
            self._waiting = deque(ticket for ticket in self._waiting if ticket not in late)
        for ticket in late:
            self._tell(ticket, TooLate(running=False))
        for ticket in [ticket for ticket in self._running.values() if ticket.finish_by <= now]:
            self._leave(ticket)
            self._tell(ticket, TooLate(running=True))

    def _admit(self) -> None:
        while self._waiting and self.engine.running < self.engine.max_batch:
            with self._changed:
                ticket = self._waiting.popleft()
            if ticket.cancelled:
                continue
            try:
                ticket.id = self.engine.admit(ticket.prepared)
            except RequestError as error:
                self._tell(ticket, error)
            except Exception as error:
                report("the engine did not take a request", error)
                self._tell(ticket, EngineFailure())
            else:
                ticket.begun = self._clock()
                self._running[ticket.id] = ticket

    def _step(self) -> None:
        if not self._running:
            return
        try:
            events = self.engine.step()
        except Exception as error:
            report("the engine failed; the requests that it worked on are given up", error)
            self._give_up()
            return
        for event in events:
            ticket = self._running.get(event.id)
            if ticket is None:  # of a request that has left
                continue
            if event.finish is not None:
                del self._running[event.id]
                self._note_duration(ticket)
            if not ticket.cancelled:
                self._tell(ticket, event)

    def _give_up(self) -> None:
        """All that runs has failed; the engine goes on if it lets go of it."""
        tickets = list(self._running.values())
        for ticket in tickets:
            self._leave(ticket)
        self._broken = self._broken or self.engine.running > 0
        for ticket in tickets:
            self._tell(ticket, EngineFailure())

    def _leave(self, ticket: Ticket) -> None:
        assert ticket.id is not None
        del self._running[ticket.id]
        try:
            self.engine.cancel(ticket.id)
        except Exception as error:
            self._broken = True
            report("the engine cannot let go of a request", error)

    def _tell(self, ticket: Ticket, outcome: Outcome) -> None:
        try:
            ticket.deliver(outcome)
        except Exception:  # who waited for it has gone, with the loop that it waited on
            ticket.cancelled = True

    def _note_duration(self, ticket: Ticket) -> None:
        assert ticket.begun is not None
        self._mean_seconds += WEIGHT * (self._clock() - ticket.begun - self._mean_seconds)

    def _end(self) -> None:
        with self._changed:
            self._draining = True
            left = [*self._waiting, *self._running.values()]
            self._waiting.clear()
            self._running.clear()
            tasks = list(self._tasks)
            self._tasks.clear()
        for ticket in left:
            self._tell(ticket, EngineFailure() if self._broken else Closed())
        for future, _ in tasks:
            if future.set_running_or_notify_cancel():
                future.set_exception(Closed())
        try:
            self.engine.close()
        except Exception as error:
            report("the engine did not close", error)


def report(what: str, error: BaseException) -> None:
    """Log where something failed, and not its message, in which there may be a client's text."""
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s: %s\n%s", what, type(error).__name__, where)
