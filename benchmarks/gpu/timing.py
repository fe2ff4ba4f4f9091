"""Contenders timed in turn on a GPU, what one call runs there, and where it makes the host wait.

Every contender's first call is timed by itself: it compiles. One that raises is reported and does not stop the others.
"""

from __future__ import annotations

import collections
import functools
import random
import re
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from common import synchronise

from dop_compile.timing.rounds import ratio

__all__ = [
    "AGAIN",
    "ORIGINAL",
    "Clock",
    "Sample",
    "kernels",
    "looked_at",
    "measure",
    "per_token",
    "reason",
    "sample",
    "synchronisations",
]

ORIGINAL, AGAIN = "original", "original again"
ATTENTION = re.compile(r"flash|fmha|attention|attn|cudnn.*sdpa|softmax", re.IGNORECASE)
SITE = re.compile(r".*/(?:site|dist)-packages/|.*/(?=dop_compile/|passes/|benchmarks/|tests/)")
Call = Callable[[], Any]


class Clock:
    """How much of a part's time is left."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()


@dataclass(frozen=True)
class Sample:
    """Milliseconds of one call: until it is done, until it returns (the host's share), and between two CUDA events."""

    wall: float
    host: float
    device: float | None


def sample(call: Call, device: torch.device) -> Sample:
    synchronise(device)
    cuda: Any = torch.cuda
    events = [cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
    started = time.perf_counter()
    if events:
        events[0].record()
    call()
    if events:
        events[1].record()
    returned = time.perf_counter()
    synchronise(device)
    ended = time.perf_counter()
    between = events[0].elapsed_time(events[1]) if events else None
    return Sample(1000 * (ended - started), 1000 * (returned - started), between)


def per_token(steps: int) -> Callable[[Callable[[int], Any], torch.device], Sample]:
    """Samples of one of `steps` generated tokens, for contenders that are told how many tokens to generate."""

    def take(call: Callable[[int], Any], device: torch.device) -> Sample:
        one, all_of_them = (sample(functools.partial(call, count), device) for count in (1, 1 + steps))
        device_ms = None
        if one.device is not None and all_of_them.device is not None:
            device_ms = (all_of_them.device - one.device) / steps
        return Sample((all_of_them.wall - one.wall) / steps, (all_of_them.host - one.host) / steps, device_ms)

    return take


def reason(error: BaseException) -> str:
    """The kind of an error and the beginning of what it says."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def measure(
    contenders: Mapping[str, Callable[..., Any]],
    rounds: int,
    device: torch.device,
    clock: Clock,
    *,
    base: str = ORIGINAL,
    take: Callable[[Any, torch.device], Sample] = sample,
    least_rounds: int = 3,
) -> list[dict[str, Any]]:
    """One row per contender, in their order: `ms` (median wall time), `host_ms`, `device_ms`, `ratio` to `base` within
    a round with quartiles, `first_s` (first call), or `error`.

    Rounds end early, but not before `least_rounds`, where the time does. A contender for whose first call no time is
    left is not begun.
    """
    rows: dict[str, dict[str, Any]] = {name: {"name": name} for name in contenders}
    ready: list[str] = []
    with torch.no_grad():
        for name, call in contenders.items():
            if clock.left <= 0:
                rows[name]["error"] = "no time left"
                continue
            try:
                started = time.perf_counter()
                take(call, device)
                rows[name]["first_s"] = time.perf_counter() - started
                take(call, device)
                ready.append(name)
            except Exception as error:  # whatever goes wrong here is a result
                rows[name]["error"] = reason(error)
                print(f"  {name}: {rows[name]['error']}", flush=True)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
        samples: dict[str, list[Sample]] = {name: [] for name in ready}
        order, shuffle = list(ready), random.Random(0)
        for number in range(rounds):
            if number >= least_rounds and clock.left <= 0:
                break
            shuffle.shuffle(order)
            for name in order:
                samples[name].append(take(contenders[name], device))
    for name in ready:
        rows[name] |= _figures(samples[name], samples.get(base))
        print(f"  {_line(rows[name])}", flush=True)
    return list(rows.values())


def _figures(values: list[Sample], base: list[Sample] | None) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "ms": statistics.median(value.wall for value in values),
        "host_ms": statistics.median(value.host for value in values),
        "rounds": len(values),
    }
    between = [value.device for value in values if value.device is not None]
    if between:
        figures["device_ms"] = statistics.median(between)
    if base is not None:
        share = ratio([value.wall for value in values], [value.wall for value in base])
        figures |= {"ratio": share.median, "quartiles": (share.low, share.high)}
    return figures


def _line(row: Mapping[str, Any]) -> str:
    share = f", {row['ratio']:.3f} of the base" if "ratio" in row else ""
    return f"{row['name']}: {row['ms']:.2f} ms (host {row['host_ms']:.2f}){share}; first call {row['first_s']:.1f} s"


def kernels(call: Call, device: torch.device) -> dict[str, Any]:
    """What one call runs on the GPU: `kernel_ms` in kernels and copies, `launches`, `copies`, `attention` kernels."""
    if device.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    with torch.no_grad(), profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize(device)
    total, launches, copies = 0.0, 0, 0
    attention: collections.Counter[str] = collections.Counter()
    for event in profiled.key_averages():
        if event.device_type.name != "CUDA" or getattr(event, "is_user_annotation", False):
            continue  # an annotation spans kernels that are there themselves
        total += event.self_device_time_total
        if event.key.startswith(("Memcpy", "Memset")):
            copies += event.count
            continue
        launches += event.count
        if ATTENTION.search(event.key):
            attention[_short_kernel(event.key)] += event.count
    found = [f"{name} x{count}" for name, count in attention.most_common(4)]
    return {"kernel_ms": total / 1000, "launches": launches, "copies": copies, "attention": found}


def _short_kernel(name: str) -> str:
    return re.split(r"[<(]", name.removeprefix("void "))[0][-80:]


def synchronisations(call: Call, device: torch.device) -> dict[str, Any]:
    """How often one call makes the host wait for the GPU, and the lines of Python that do."""
    if device.type != "cuda":
        return {}
    places: collections.Counter[str] = collections.Counter()
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            places[f"{SITE.sub('', warning.filename, count=1)}:{warning.lineno}"] += 1
    found = [f"{place} x{count}" for place, count in places.most_common(12)]
    return {"syncs": sum(places.values()), "sync_places": found}


def looked_at(
    rows: list[dict[str, Any]], contenders: Mapping[str, Call], device: torch.device, clock: Clock
) -> list[dict[str, Any]]:
    """The rows with what one more call of each contender shows: kernels, and waits of the host."""
    for row in rows:
        for look in (kernels, synchronisations):
            if "error" in row or clock.left <= 0:
                continue
            try:
                row |= look(contenders[row["name"]], device)
            except Exception as error:  # the times stand without it
                row["not_looked_at"] = reason(error)
                print(f"  {row['name']}: {look.__name__}: {reason(error)}", flush=True)
    return rows
