"""Similarities and rankings that do not depend on the order in which a matrix product adds up.

Sums are taken in float64 and rounded to float32, in which everything is compared. So equal features have equal
similarities, whatever their place in a batch, and a tie is a tie that goes to the lowest index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dop_compile.reducers.base import Selection, VisualContext

__all__ = ["LARGE", "at_once", "by_count", "cosine", "fraction", "order_keys", "ranked", "rows_of", "stacked", "wide"]

LARGE = 1024
"""Tokens of a part beyond which no similarity of all of them with all is made."""
NUMBERS = 1 << 24
"""Of a temporary: what is larger is made in pieces."""


def wide(device: torch.device) -> torch.dtype:
    """The dtype of sums: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _unit(features: Tensor) -> Tensor:
    features = features.to(wide(features.device))
    norm = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    unit: Tensor = features / norm.clamp(min=torch.finfo(torch.float32).tiny)
    return unit


def cosine(a: Tensor, b: Tensor | None = None) -> Tensor:
    """(..., n, m) float32 cosines of the rows of a (..., n, dim) and b (..., m, dim); b is a if None.

    The cosine with a zero row, and what is not a number, is 0.
    """
    if a.numel() > NUMBERS // 4 and a.dim() > 2:
        return torch.stack([cosine(part, other) for part, other in zip(a, a if b is None else b, strict=True)])
    if a.numel() > NUMBERS // 4 and len(a) > LARGE:
        return torch.cat([cosine(part, a if b is None else b) for part in a.split(LARGE)])
    first = _unit(a)
    second = first if b is None else _unit(b)
    return torch.nan_to_num((first @ second.transpose(-1, -2)).float())


def ranked(scores: Tensor) -> Tensor:
    """(..., n) indices by descending score; ties: ascending index."""
    return torch.nan_to_num(scores).sort(dim=-1, descending=True, stable=True).indices


def order_keys(scores: Tensor, indices: Tensor | None = None) -> Tensor:
    """(..., n) int64 that fall in the order of `ranked`: by descending score, equal ones by ascending index.

    Args:
        scores: (..., n) float32, no NaN.
        indices: (n,) or (..., n) of the scores, below 2^31; None: their places.
    """
    bits = (scores + 0.0).view(torch.int32).long()  # a sum, since -0.0 equals 0.0
    if indices is None:
        indices = torch.arange(scores.shape[-1], device=scores.device)
    return (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32) - indices


def rows_of(values: Tensor, indices: Tensor) -> Tensor:
    """(batch, k, dim) rows `indices` (batch, k) of values (batch, n, dim)."""
    return values.gather(1, indices[..., None].expand(-1, -1, values.shape[-1]))


def stacked(contexts: Sequence[VisualContext], name: str) -> Tensor:
    """A field of all contexts, stacked: (contexts, tokens, ...); of a single one, no copy."""
    if len(contexts) == 1:
        alone: Tensor = getattr(contexts[0], name)[None]
        return alone
    return torch.stack([getattr(context, name) for context in contexts])


def at_once(contexts: Sequence[VisualContext], name: str) -> int:
    """How many of these contexts of equal size to work on together, so that temporaries stay small."""
    features: Tensor = getattr(contexts[0], name)
    tokens, width = features.shape
    return max(1, NUMBERS // max(1, tokens * max(width, min(tokens, LARGE))))


def by_count(
    contexts: Sequence[VisualContext],
    counts: Sequence[int],
    select: Callable[[Sequence[VisualContext], int], Sequence[Selection]],
    together: int,
) -> list[Selection]:
    """Call `select(contexts, count)` for contexts of one count, at most `together` of them at a time."""
    result: list[Selection | None] = [None] * len(contexts)
    for count in dict.fromkeys(counts):
        same = [number for number, other in enumerate(counts) if other == count]
        for first in range(0, len(same), together):
            numbers = same[first : first + together]
            found = select([contexts[n] for n in numbers], count)
            for number, selection in zip(numbers, found, strict=True):
                result[number] = selection
    assert all(selection is not None for selection in result)
    return [selection for selection in result if selection is not None]


def fraction(reducer: str, name: str, value: object) -> None:
    """Refuse what is no number from 0 to 1.

    Raises:
        TypeError, ValueError: naming the reducer and the option.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"reducer {reducer!r}: {name} must be a number, not {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"reducer {reducer!r}: {name} must be from 0 to 1, not {value!r}")
