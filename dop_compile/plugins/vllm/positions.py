"""Where kept visual tokens stand: at their positions before reduction, as M-RoPE positions (3, tokens).

A decoder of one-dimensional positions is one of M-RoPE whose three rows are equal: that is how vLLM can be told positions
that are not counted up. Two ways, by what is known when vLLM asks for them, before the vision tower has run:

1. the reducer goes by numbers alone: positions of the prompt before reduction, without the dropped columns.
2. it looks at the picture: which tokens are kept comes with the embeddings (`pack`), so vLLM is first told where each
   picture begins, and behind these columns the same once more, which stays when they are replaced (`place`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Placed", "columns", "pack", "place", "unpack", "with_bases"]

DIGITS, BASE = 2, 128
"""Offsets travel in the embeddings' dtype: digits of a base that float16 and bfloat16 hold exactly."""
CHANNELS = 3 * DIGITS


@dataclass(frozen=True)
class Placed:
    """A picture in a shortened prompt.

    Args:
        rows: (kept,) its rows there.
        tokens: its visual tokens before reduction.
        kept: (kept,) which of them are there, ascending; None while that is not known.
    """

    rows: Tensor
    tokens: int
    kept: Tensor | None


def columns(length: int, pictures: Sequence[Placed]) -> tuple[Tensor, int]:
    """(length,) the place that each row had before reduction, and the length of that prompt.

    Rows of pictures whose kept tokens are not known have that of the picture's first token.
    """
    dropped = torch.zeros(length + 1, dtype=torch.long)
    for picture in pictures:
        dropped[int(picture.rows[-1]) + 1] += picture.tokens - len(picture.rows)
    shift = dropped.cumsum(0)
    found = torch.arange(length) + shift[:length]
    for picture in pictures:
        first = found[picture.rows[0]]
        found[picture.rows] = first if picture.kept is None else first + picture.kept
    return found, length + int(shift[-1])


def with_bases(positions: Tensor, pictures: Sequence[Placed], later: int) -> Tensor:
    """(3, 2 * length + 1) what `place` works on.

    Positions; behind them those of each picture's first token at its rows, elsewhere -1; and `later`, which is to be
    added to positions of tokens behind the prompt.
    """
    bases = torch.full_like(positions, -1)
    for picture in pictures:
        bases[:, picture.rows] = positions[:, picture.rows]
    return torch.cat([positions, bases, torch.full_like(positions[:, :1], later)], dim=1)


def pack(features: Tensor, offsets: Tensor) -> Tensor:
    """Embeddings (kept, hidden) with (3, kept) offsets from the picture's first position in further channels.

    Raises:
        ValueError: a picture larger than can be written so.
    """
    if offsets.numel() and int(offsets.max()) >= BASE**DIGITS:
        raise ValueError(f"a picture of more than {BASE**DIGITS} positions cannot be reduced in vLLM; make it smaller")
    digits = torch.cat([offsets // BASE, offsets % BASE]).T
    return torch.cat([features, digits.to(features)], dim=1)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """What `pack` was given."""
    digits = packed[:, -CHANNELS:].T.long()
    return packed[:, :-CHANNELS], digits[:3] * BASE + digits[3:]


def place(positions: Tensor, offsets: Sequence[Tensor], computed: int) -> tuple[Tensor, int]:
    """Positions `with_bases` in which the next rows of pictures, from row `computed` on, have their own; and `later`.

    Args:
        positions: (3, 2 * length + 1).
        offsets: (3, rows) of each stretch of a picture that the step computes, in order.
        computed: rows of the prompt that were computed before.
    """
    length = positions.shape[1] // 2
    later, result = int(positions[0, -1]), positions.clone()
    if offsets:
        moved = torch.cat(list(offsets), dim=1).to(positions)
        rows = (positions[0, length + computed : -1] >= 0).nonzero().flatten()[: moved.shape[1]] + computed
        result[:, rows] = positions[:, rows + length] + moved
    return result, later
