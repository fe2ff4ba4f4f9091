"""Strict values at the door: each check names the field and says what was expected (a bool is no number)."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["choice", "finite", "integer", "pairs", "store"]


def store(instance: object, field: str, value: object) -> None:
    """Set a field of a frozen dataclass while it is being built."""
    object.__setattr__(instance, field, value)


def integer(field: str, value: object, *, low: int, high: int | None = None, none: str = "") -> int:
    """`value` as an int in [low, high]; TypeError for bool, float and the rest, ValueError out of range."""
    bounds = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    expected = f"expected {bounds}" + (f", or None ({none})" if none else "")
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{field}: {expected}, got {value!r}") from None
    if number < low or (high is not None and number > high):
        raise ValueError(f"{field}: {expected}, got {number}")
    return number


def finite(field: str, value: object) -> float:
    """`value` as a finite float; TypeError for bool and non-numbers, ValueError for NaN and infinities."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{field}: expected a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{field}: expected a finite number, got {value!r}")
    return number


def choice(field: str, value: object, choices: Iterable[str]) -> str:
    """`value` when it is one of `choices`, else an error that suggests the nearest."""
    names = tuple(choices)
    if not isinstance(value, str):
        raise TypeError(f"{field}: expected one of {', '.join(names)}, got {value!r}")
    if value not in names:
        nearest = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"{field}: expected one of {', '.join(names)}, got {value!r}{hint}")
    return value


def pairs(field: str, value: object) -> tuple[tuple[str, Any], ...]:
    """A mapping, or an iterable of (name, value), as a tuple sorted by name."""
    items = value.items() if isinstance(value, Mapping) else value
    if isinstance(items, str) or not isinstance(items, Iterable):
        raise TypeError(f"{field}: expected a mapping from names to values, got {value!r}")
    found: dict[str, Any] = {}
    for item in items:
        if not isinstance(item, tuple | list) or len(item) != 2 or not isinstance(item[0], str) or not item[0]:
            raise TypeError(f"{field}: expected (name, value) pairs with string names, got {item!r}")
        if item[0] in found:
            raise ValueError(f"{field}: the name {item[0]!r} is given twice; give each name once")
        found[item[0]] = item[1]
    return tuple(sorted(found.items(), key=operator.itemgetter(0)))
