"""Similarities and rankings that do not depend on the order in which a matrix product adds up.

Sums are taken in float64 and rounded to float32, in which everything is compared. So equal features have equal
similarities, whatever their place in a batch, and a tie is a tie that goes to the lowest index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dop_compile.reducers.base import Selection, VisualContext

__all__ = ["by_count", "cosine", "fraction", "ranked", "rows_of", "stacked", "wide"]


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
    first = _unit(a)
    second = first if b is None else _unit(b)
    return torch.nan_to_num((first @ second.transpose(-1, -2)).float())


def ranked(scores: Tensor) -> Tensor:
    """(..., n) indices by descending score; ties: ascending index."""
    return torch.nan_to_num(scores).sort(dim=-1, descending=True, stable=True).indices


def rows_of(values: Tensor, indices: Tensor) -> Tensor:
    """(batch, k, dim) rows `indices` (batch, k) of values (batch, n, dim)."""
    return values.gather(1, indices[..., None].expand(-1, -1, values.shape[-1]))


def stacked(contexts: Sequence[VisualContext], name: str) -> Tensor:
    """A field of all contexts, stacked: (contexts, tokens, ...)."""
    return torch.stack([getattr(context, name) for context in contexts])


def by_count(
    contexts: Sequence[VisualContext],
    counts: Sequence[int],
    select: Callable[[Sequence[VisualContext], Tensor, int], Sequence[Selection]],
) -> list[Selection]:
    """Call `select(contexts, numbers, count)` once for each count; `numbers` are the places of its contexts."""
    result: list[Selection | None] = [None] * len(contexts)
    for count in dict.fromkeys(counts):
        numbers = [number for number, other in enumerate(counts) if other == count]
        found = select([contexts[n] for n in numbers], torch.tensor(numbers, device="cpu"), count)
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
