"""Generated tokens as they come: when rows end, and what of their text can be shown already."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

__all__ = ["Token", "TokenStream"]

_INCOMPLETE = "\ufffd"
"""What decoding puts for a character of which not all bytes are there."""


@dataclass(frozen=True)
class Token:
    """One generated token.

    Args:
        row: of the batch.
        id: special tokens too.
        text: what it adds to the row's text; the texts of a row, joined, are the row's text. "" for special tokens, and
            while a character of several tokens is incomplete.
        last: no more tokens follow in this row.
    """

    row: int
    id: int
    text: str
    last: bool


class TokenStream:
    """Collects the tokens of a batch.

    Args:
        ends: ids that end a row.
        limit: tokens per row at most.
        decode: ids -> text.
        callback: is given every token of rows that have not ended, step by step and in each step row by row.
    """

    def __init__(
        self,
        rows: int,
        ends: Collection[int],
        limit: int,
        decode: Callable[[Sequence[int]], str],
        callback: Callable[[Token], None] | None,
    ):
        self.ids: list[list[int]] = [[] for _ in range(rows)]
        self._ends, self._limit = frozenset(ends), limit
        self._decode, self._callback = decode, callback
        self._shown = [""] * rows
        self._open = [True] * rows

    @property
    def done(self) -> bool:
        return not any(self._open)

    def add(self, chosen: Sequence[int]) -> None:
        """A step's token of each row; those of ended rows are left out."""
        for row, token in enumerate(chosen):
            if not self._open[row]:
                continue
            self.ids[row].append(token)
            self._open[row] = token not in self._ends and len(self.ids[row]) < self._limit
            if self._callback is not None:
                self._callback(Token(row, token, self._new_text(row), not self._open[row]))

    def _new_text(self, row: int) -> str:
        text, shown = self._decode(self.ids[row]), self._shown[row]
        if self._open[row] and (text.endswith(_INCOMPLETE) or not text.startswith(shown)):
            return ""
        self._shown[row] = text
        return text[len(shown) :]
