"""What reducers that merge tokens have in common: features before the projector are merged, and projected again.

A kept token that nothing is merged into enters the decoder as it would without the reducer, bit by bit. Several tokens
merged into one take the place and the position of a token that would otherwise be dropped, or of the one kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dop_compile.reducers.base import Selection, VisualContext
from dop_compile.reducers.numbers import NUMBERS, rows_of, stacked

__all__ = ["MERGED_FIELDS", "last_dropped", "merged_selections", "others", "pieces"]

MERGED_FIELDS = frozenset({"features", "project"})


def others(indices: Tensor, tokens: int) -> Tensor:
    """(batch, tokens - k) the tokens that are not among `indices` (batch, k), ascending."""
    taken = torch.zeros(len(indices), tokens, dtype=torch.int8, device=indices.device).scatter_(1, indices, 1)
    return taken.sort(dim=1, stable=True).indices[:, : tokens - indices.shape[1]]


def pieces(features: Tensor, numbers: int = 1) -> int:
    """How many tokens of features (batch, tokens, dim) to work on at a time, where each needs as many numbers more."""
    return max(1, NUMBERS // 4 // max(1, len(features) * max(features.shape[2], numbers)))


def last_dropped(indices: Tensor, tokens: int) -> Tensor:
    """(batch, 1) the last token that is not among `indices`: where the token made of the rest stands."""
    return others(indices, tokens)[:, -1:]


def merged_selections(
    contexts: Sequence[VisualContext], plain: Tensor, places: Tensor, merged: Tensor
) -> list[Selection]:
    """Selections of `plain` tokens (batch, p) as they are, and of `merged` features at `places` (batch, m).

    Args:
        contexts: (batch) contexts with `project`.
        merged: (batch, m, vision_hidden) features before the projector.
    """
    projected = stacked(contexts, "projected")
    project = contexts[0].project
    assert project is not None
    new = project(merged.flatten(0, 1).to(stacked(contexts, "features").dtype)).view(*places.shape, -1).to(projected)
    features = torch.cat([rows_of(projected, plain), new], dim=1)
    return [Selection(i, f) for i, f in zip(torch.cat([plain, places], dim=1), features, strict=True)]
