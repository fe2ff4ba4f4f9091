"""Where time goes: the parts of a call, on a clock that is set by hand."""

from __future__ import annotations

import time

import pytest
import torch

from dop_compile.evaluation.clock import Clock
from dop_compile.spans import SELECTION, listening, span


class Hand:
    def __init__(self) -> None:
        self.seconds = 100.0

    def pass_(self, milliseconds: float) -> None:
        self.seconds += milliseconds / 1000

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Hand:
    hand = Hand()
    monkeypatch.setattr(time, "perf_counter", hand)
    return hand


def test_parts_are_told_apart_and_add_up(hand: Hand) -> None:
    clock = Clock(torch.device("cpu"))
    hand.pass_(1000)  # before it runs
    with clock.running():
        hand.pass_(1)  # tower
        with span(SELECTION):
            hand.pass_(2)  # of the tower's attention
        hand.pass_(4)
        clock.enter_decoder()
        hand.pass_(8)
        with span(SELECTION):
            hand.pass_(16)
        hand.pass_(32)
        clock.leave_model()
        for _ in range(2):
            hand.pass_(64)
            clock.enter_decoder()
            hand.pass_(128)
            clock.leave_model()
        hand.pass_(256)
    hand.pass_(1000)
    assert clock.milliseconds == pytest.approx(
        {"vision": 5, "selection": 18, "prefill": 40, "decode": 2 * (64 + 128) + 256}
    )


def test_spans_cost_nothing_and_are_told_to_nobody_without_a_listener() -> None:
    told: list[tuple[str, bool]] = []
    with listening(lambda name, begins: told.append((name, begins))), pytest.raises(KeyError), span("a"), span("b"):
        raise KeyError
    with span("c"):
        pass
    assert told == [("a", True), ("b", True), ("b", False), ("a", False)]
