"""Named stretches of work inside a call, for whoever measures them; nothing happens where nobody listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["SELECTION", "listening", "span"]

SELECTION = "selection"
"""Choosing visual tokens: what a reducer computes, and what is computed for it alone, and what a ranking computes."""

Listener = Callable[[str, bool], None]
_listener: ContextVar[Listener | None] = ContextVar("dop_compile_spans", default=None)


@contextmanager
def span(name: str) -> Iterator[None]:
    """Work of that name is done while the block runs."""
    listener = _listener.get()
    if listener is None:
        yield
        return
    listener(name, True)
    try:
        yield
    finally:
        listener(name, False)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """While the block runs, in this thread, `listener(name, begins)` is told of every span."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
