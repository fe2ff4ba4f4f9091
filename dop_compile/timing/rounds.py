"""Contenders one after the other in every round, so that a machine that slows down slows all of them."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from tqdm import tqdm

__all__ = ["Ratio", "interleave", "milliseconds", "ratio", "synchronise"]

WARM_UPS = 2
Measured = TypeVar("Measured")


def synchronise(device: torch.device) -> None:
    """Wait for what the device still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call, the device's work included."""
    synchronise(device)
    started = time.perf_counter()
    call()
    synchronise(device)
    return 1000 * (time.perf_counter() - started)


def interleave(
    contenders: Mapping[str, Callable[[], Measured]], rounds: int, *, warm_ups: int = WARM_UPS, progress: str = "rounds"
) -> dict[str, list[Measured]]:
    """What each contender returned in each round.

    Every round asks each contender once, in a new random order. Warm-ups before are not counted: what is compiled or
    allocated on first use is no part of a time.
    """
    found: dict[str, list[Measured]] = {name: [] for name in contenders}
    order, shuffle = list(contenders), random.Random(0)
    for name in tqdm(order, desc=f"{progress}: warm up", leave=False):
        for _ in range(warm_ups):
            contenders[name]()
    for _ in tqdm(range(rounds), desc=progress, leave=False):
        shuffle.shuffle(order)
        for name in order:
            found[name].append(contenders[name]())
    return found


@dataclass(frozen=True)
class Ratio:
    """Of two contenders' times: the median of the ratios within a round, and their quartiles."""

    median: float
    low: float
    high: float


def ratio(values: Sequence[float], of: Sequence[float]) -> Ratio:
    """`values` over `of`, round by round; with one round the quartiles are the ratio itself."""
    ratios = [value / base for value, base in zip(values, of, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Ratio(median, low, high)
