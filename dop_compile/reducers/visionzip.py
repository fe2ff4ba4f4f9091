"""VisionZip: tokens that [CLS] attends to, and averages of the rest (Yang et al. 2024, arXiv 2412.04467).

Per image, tile or frame, T tokens are kept:

1. the dominant ones, of the highest [CLS] attention, as they are;
2. of the n others, `contextual` targets at even steps of max(1, n // contextual). Each remaining token is assigned to
   the target of the most similar key (cosine, mean over heads), and a target becomes itself plus the mean of what is
   assigned to it, before the projector (as the published code has it).

Any T from 0 to N: of T, round(T * contextual) are contextual, 10 of 64 by default. Ties go to the lowest index. A
contextual token has its target's place and position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dop_compile.reducers.base import Selection, VisualContext
from dop_compile.reducers.merging import MERGED_FIELDS, merged_selections, others, pieces
from dop_compile.reducers.numbers import at_once, by_count, cosine, fraction, ranked, rows_of, stacked, wide

__all__ = ["VisionZipReducer"]


@dataclass(frozen=True)
class VisionZipReducer:
    """Ranks the dominant tokens first, by attention, then the contextual ones in raster order.

    Args:
        contextual: share of the kept tokens that are contextual.

    Raises:
        TypeError, ValueError: a share that is not a number from 0 to 1.
    """

    contextual: float = 10 / 64
    name = "visionzip"
    requires = MERGED_FIELDS | {"cls_attention", "keys"}
    per_tile = True

    def __post_init__(self) -> None:
        fraction("visionzip", "contextual", self.contextual)

    def __call__(self, context: VisualContext, count: int) -> Selection:
        return self.select_many([context], [count])[0]

    def select_many(self, contexts: Sequence[VisualContext], counts: Sequence[int]) -> list[Selection]:
        return by_count(contexts, counts, self._select, at_once(contexts, "features"))

    def _select(self, contexts: Sequence[VisualContext], count: int) -> list[Selection]:
        order = ranked(stacked(contexts, "cls_attention").detach())
        contextual = int(count * self.contextual + 0.5)
        dominant = order[:, : count - contextual]
        rest = others(dominant, order.shape[1])
        assigned_count = rest.shape[1] - contextual
        if not contextual or not assigned_count:
            return [Selection(row) for row in torch.cat([dominant, rest[:, :contextual]], dim=1)]
        step = max(1, rest.shape[1] // contextual)
        at = torch.arange(contextual, device=rest.device) * step
        targets, assigned = rest[:, at], rest[:, others(at[None], rest.shape[1])[0]]
        merged = _averaged(stacked(contexts, "features"), stacked(contexts, "keys").detach(), targets, assigned)
        return merged_selections(contexts, dominant, targets, merged)


def _averaged(features: Tensor, keys: Tensor, targets: Tensor, assigned: Tensor) -> Tensor:
    """(batch, targets, vision_hidden): each target plus the mean of the tokens assigned to it."""
    dtype, count = wide(features.device), targets.shape[1]
    own = rows_of(keys, targets)
    total = members = torch.zeros((), dtype=dtype, device=features.device)
    for part in assigned.split(pieces(features, count), dim=1):
        nearest = cosine(rows_of(keys, part), own).argmax(dim=2)
        member = torch.nn.functional.one_hot(nearest, count).transpose(1, 2).to(dtype)
        total = total + member @ rows_of(features, part).to(dtype)
        members = members + member.sum(dim=2, keepdim=True)
    return rows_of(features, targets).to(dtype) + total / members.clamp(min=1)
