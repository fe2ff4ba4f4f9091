"""Rounds in which all take turns, and the ratios within them."""

from __future__ import annotations

import functools
import statistics
from typing import Any

import pytest
import torch

from dop_compile.timing import rounds
from dop_compile.timing.rounds import Ratio, interleave, milliseconds, ratio


def test_every_round_asks_everybody_once_in_changing_order() -> None:
    asked: list[str] = []

    def ask(name: str) -> int:
        asked.append(name)
        return len(asked)

    names = ["a", "b", "c", "d"]
    found = interleave({name: functools.partial(ask, name) for name in names}, 6, warm_ups=2)
    assert asked[:8] == ["a", "a", "b", "b", "c", "c", "d", "d"]
    orders = [asked[8 + 4 * number : 12 + 4 * number] for number in range(6)]
    assert [sorted(order) for order in orders] == [names] * 6
    assert len({tuple(order) for order in orders}) > 1
    # What they returned, in the order of the rounds and without the warm-ups
    assert list(found) == names
    assert all(found[name] == [n + 1 for n, own in enumerate(asked) if own == name and n >= 8] for name in names)


def test_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([2.0, 2.25])
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: next(now))
    assert milliseconds(lambda: None, torch.device("cpu")) == 250.0


def test_ratios_are_taken_within_rounds() -> None:
    values, base = [10.0, 40.0, 90.0, 20.0, 50.0], [10.0, 20.0, 30.0, 40.0, 50.0]
    ratios = sorted(v / b for v, b in zip(values, base, strict=True))
    expected = Ratio(statistics.median(ratios), ratios[1], ratios[3])  # quartiles of five are the second and fourth
    assert ratio(values, base) == expected == Ratio(1.0, 1.0, 2.0)
    assert ratio([3.0], [2.0]) == Ratio(1.5, 1.5, 1.5)
    mismatched: Any = [1.0]
    with pytest.raises(ValueError, match="shorter"):
        ratio(values, mismatched)
