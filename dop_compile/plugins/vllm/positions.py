"""Where kept visual tokens stand: at their positions before reduction, as M-RoPE positions (3, tokens).

A decoder of one-dimensional positions is one of M-RoPE whose three rows are equal: that is how vLLM can be told
positions that are not counted up. Two ways, by what is known when vLLM asks for them, before the vision tower has run:

1. the reducer goes by numbers alone: positions of the prompt before reduction, without the dropped columns (`columns`).
2. it looks at the picture: rows of a picture are all said to stand where it begins. Which tokens are kept comes with
   the embeddings (`pack`), and is added in the step that computes them (`unpack`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Placed", "columns", "pack", "unpack"]

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


def columns(length: int, pictures: Sequence[Placed]) -> tuple[Tensor, list[int], int]:
    """(length,) the place that each row had before reduction; that of each picture's first token; that prompt's length.

    Rows of pictures whose kept tokens are not known have the place of the picture's first token.
    """
    dropped = torch.zeros(length + 1, dtype=torch.long)
    for picture in pictures:
        dropped[int(picture.rows[-1]) + 1] += picture.tokens - len(picture.rows)
    shift = dropped.cumsum(0)
    found = torch.arange(length) + shift[:length]
    firsts = [int(found[picture.rows[0]]) for picture in pictures]
    for picture, first in zip(pictures, firsts, strict=True):
        found[picture.rows] = first if picture.kept is None else first + picture.kept
    return found, firsts, length + int(shift[-1])


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
