"""Requests of many threads on one engine's thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from dop_compile.serving.requests import Event, RequestError
from dop_compile.serving.scheduler import Closed, EngineFailure, QueueFull, Scheduler, TooLate
from tests.serving.served import as_request
from tests.serving.words import WordEngine, answer

TEXTS = [f"question {number}" for number in range(12)]


class Told:
    """What a request is told."""

    def __init__(self) -> None:
        self.outcomes: list[Any] = []
        self.ended = threading.Event()

    def __call__(self, outcome: Any) -> None:
        self.outcomes.append(outcome)
        if isinstance(outcome, Exception) or outcome.finish is not None:
            self.ended.set()

    @property
    def text(self) -> str:
        assert self.ended.wait(10)
        return "".join(event.text for event in self.outcomes)

    @property
    def error(self) -> Any:
        assert self.ended.wait(10)
        return self.outcomes[-1]


class Clock:
    """Stands still until it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def submit(scheduler: Scheduler, text: str, tier: str | None = None, **limits: float) -> tuple[Any, Told]:
    told = Told()
    prepared = scheduler.engine.prepare(as_request(text, tier=tier))
    ticket = scheduler.submit(prepared, told, **{"queue_seconds": 60.0, "request_seconds": 60.0, **limits})
    return ticket, told


def end(scheduler: Scheduler) -> None:
    scheduler.drain()
    assert scheduler.join(10)


@pytest.fixture
def held() -> Iterator[tuple[Scheduler, WordEngine, threading.Event]]:
    """Steps wait until the event is set."""
    gate = threading.Event()
    engine = WordEngine(max_batch=2, gate=gate)
    scheduler = Scheduler(engine, queue=2)
    scheduler.start()
    yield scheduler, engine, gate
    gate.set()
    end(scheduler)


def until(condition: Any) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_every_request_gets_its_own_answer_and_none_runs_beyond_the_batch() -> None:
    engine = WordEngine(max_batch=3)
    scheduler = Scheduler(engine, queue=64)
    scheduler.start()
    tiers = [engine.tiers[number % 2] for number in range(len(TEXTS))]
    told = [submit(scheduler, text, tier)[1] for text, tier in zip(TEXTS, tiers, strict=True)]
    for one, text, tier in zip(told, TEXTS, tiers, strict=True):
        assert one.text == answer(as_request(text), tier)[0]
    assert engine.most == 3
    end(scheduler)
    assert engine.closed
    assert len(engine.threads) == 1


def test_a_request_joins_while_another_runs() -> None:
    engine = WordEngine(max_batch=2, seconds=0.005)
    scheduler = Scheduler(engine, queue=8)
    scheduler.start()
    _, first = submit(scheduler, "first")
    until(lambda: first.outcomes)
    _, second = submit(scheduler, "second")
    until(lambda: second.outcomes)
    assert not first.ended.is_set()
    assert (first.text, second.text) == tuple(answer(as_request(text), "100%")[0] for text in ("first", "second"))
    end(scheduler)


def test_the_queue_has_an_end(held: tuple[Scheduler, WordEngine, threading.Event]) -> None:
    scheduler, engine, gate = held
    told = [submit(scheduler, text)[1] for text in TEXTS[:4]]
    with pytest.raises(QueueFull) as full:
        submit(scheduler, "one more")
    assert 1 <= full.value.seconds <= 60
    gate.set()
    assert [one.text for one in told] == [answer(as_request(text), "100%")[0] for text in TEXTS[:4]]
    assert submit(scheduler, "one more")[1].text
    assert engine.most == 2


def test_a_cancelled_request_is_told_nothing_more(held: tuple[Scheduler, WordEngine, threading.Event]) -> None:
    scheduler, engine, gate = held
    (runs, told), (_, other), (waits, never) = (submit(scheduler, text) for text in TEXTS[:3])
    until(lambda: engine.running == 2)
    scheduler.cancel(runs)
    scheduler.cancel(waits)
    gate.set()
    assert other.text
    end(scheduler)
    assert engine.cancelled == [1]
    assert engine.admitted == 2
    assert not never.outcomes
    assert not any(isinstance(outcome, Event) for outcome in told.outcomes)


def test_time_is_up_for_those_that_wait_and_for_those_that_run() -> None:
    clock, gate = Clock(), threading.Event()
    engine = WordEngine(max_batch=1, gate=gate)
    scheduler = Scheduler(engine, queue=4, clock=clock)
    scheduler.start()
    _, runs = submit(scheduler, "runs", request_seconds=5)
    until(lambda: engine.running)
    _, waits = submit(scheduler, "waits", queue_seconds=5)
    _, patient = submit(scheduler, "patient")
    clock.now = 5
    gate.set()
    assert isinstance(runs.error, TooLate)
    assert runs.error.running
    assert isinstance(waits.error, TooLate)
    assert not waits.error.running
    assert patient.text == answer(as_request("patient"), "100%")[0]
    end(scheduler)


def test_draining_finishes_what_runs_and_refuses_the_rest(held: tuple[Scheduler, WordEngine, threading.Event]) -> None:
    scheduler, _, gate = held
    _, first = submit(scheduler, "first")
    _, second = submit(scheduler, "second")
    until(lambda: scheduler.running == 2)
    _, third = submit(scheduler, "third")
    scheduler.drain()
    gate.set()
    assert isinstance(third.error, Closed)
    assert first.text == answer(as_request("first"), "100%")[0]
    assert second.text
    with pytest.raises(Closed):
        submit(scheduler, "late")
    with pytest.raises(Closed):
        scheduler.call(int)


def test_something_else_runs_between_steps() -> None:
    engine = WordEngine(seconds=0.001)
    scheduler = Scheduler(engine, queue=4)
    scheduler.start()
    _, told = submit(scheduler, "runs")
    assert scheduler.call(threading.get_ident).result(10) in engine.threads | {scheduler._thread.ident}

    def fails() -> None:
        raise RequestError("no")

    with pytest.raises(RequestError):
        scheduler.call(fails).result(10)
    assert told.text
    end(scheduler)


def test_a_request_that_the_engine_does_not_take_is_told_why() -> None:
    engine = WordEngine()
    scheduler = Scheduler(engine, queue=4)
    take = engine.admit

    def admit(prepared: Any) -> int:
        text = prepared.request.messages[0]["content"]
        if text == "wrong":
            raise RequestError("not this")
        if text == "failing":
            raise OSError
        return take(prepared)

    engine.admit = admit  # type: ignore[method-assign]
    scheduler.start()
    wrong, failing, fine = (submit(scheduler, text)[1] for text in ("wrong", "failing", "fine"))
    assert isinstance(wrong.error, RequestError)
    assert isinstance(failing.error, EngineFailure)
    assert fine.text
    end(scheduler)


def test_who_cannot_be_told_does_not_stop_the_others() -> None:
    engine = WordEngine(seconds=0.001)
    scheduler = Scheduler(engine, queue=4)
    scheduler.start()

    def gone(_: Any) -> None:
        raise RuntimeError("the loop is closed")

    scheduler.submit(engine.prepare(as_request("gone")), gone, queue_seconds=9, request_seconds=9)
    assert submit(scheduler, "stays")[1].text
    end(scheduler)
    assert engine.cancelled == [1]
