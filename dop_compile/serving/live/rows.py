"""One answer as it grows: which part of its text can be shown already, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from dop_compile.serving.requests import Event

__all__ = ["Row"]

INCOMPLETE = "\ufffd"
"""What decoding puts for a character of which not all bytes are there."""


@dataclass
class Row:
    """The answer to one request.

    Args:
        id: the engine's number of the request.
        limit: of new tokens.
        stops: texts that end it and are not part of it. They count in the answer alone, also where they are made of
            several tokens or begin inside of one.
        ends: ids that end it.
        decode: ids -> text.
    """

    id: int
    limit: int
    stops: tuple[str, ...]
    ends: Collection[int]
    decode: Callable[[Sequence[int]], str]
    ids: list[int] = field(default_factory=list)
    shown: int = 0
    is_open: bool = True

    def add(self, token: int) -> Event:
        """The next token, while the row is open."""
        self.ids.append(token)
        text = self.decode(self.ids)
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        finish = None
        if found:
            text, finish = text[: min(found)], "stop"
        elif token in self.ends:
            finish = "stop"
        elif len(self.ids) >= self.limit:
            finish = "length"
        self.is_open = finish is None
        certain = len(text) if finish else self._certain(text)
        piece = text[self.shown : certain]
        self.shown = max(certain, self.shown)
        return Event(self.id, piece, 1, finish)

    def _certain(self, text: str) -> int:
        """Characters at the beginning that stay as they are, whatever follows."""
        if text.endswith(INCOMPLETE):
            text = text.rstrip(INCOMPLETE)
        longest = max(map(len, self.stops), default=1)
        for held in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-held:]) for stop in self.stops):
                return len(text) - held
        return len(text)
