"""PruMerge and PruMerge+: tokens that [CLS] attends to, with others merged in (Shang et al. 2024, arXiv 2403.15388).

Per image, tile or frame, T tokens are kept:

1. T - 1 tokens: for `prumerge` those of the highest [CLS] attention; for `prumerge_plus` one of these for three that
   are evenly spaced over the others;
2. to each is added the sum of its 32 nearest neighbours (cosine of keys, among all tokens), weighted by their
   attention;
3. all dropped tokens, weighted by their attention, are summed up into one more, at the place of the last of them.

Merging is before the projector. All tokens (T = N) are kept as they are.

With the option `adaptive`, T is an upper limit, and the number of tokens taken by attention is that of outliers: tokens
whose attention exceeds the third quartile by more than 1.5 interquartile ranges, counted per image.

Any T from 0 to N. Ties go to the lowest index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dop_compile.reducers.base import Selection, VisualContext
from dop_compile.reducers.merging import MERGED_FIELDS, last_dropped, merged_selections, others
from dop_compile.reducers.numbers import by_count, cosine, ranked, rows_of, stacked, wide

__all__ = ["PruMergePlusReducer", "PruMergeReducer"]

SPACED_PER_ATTENDED = 3


@dataclass(frozen=True)
class PruMergeReducer:
    """Ranks the tokens taken by attention first, then evenly spaced ones in raster order, then the merged rest.

    Args:
        adaptive: keep at most T tokens, as many as the outlier rule asks for.
        neighbours: how many tokens are merged into each kept one.

    Raises:
        TypeError, ValueError: an option of another type, or a negative number of neighbours.
    """

    adaptive: bool = False
    neighbours: int = 32
    name: ClassVar[str] = "prumerge"
    requires: ClassVar[frozenset[str]] = MERGED_FIELDS | {"cls_attention", "keys"}
    per_tile: ClassVar[bool] = True
    spaced: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if not isinstance(self.adaptive, bool):
            raise TypeError(f"reducer {self.name!r}: adaptive must be true or false, not {self.adaptive!r}")
        if not isinstance(self.neighbours, int) or isinstance(self.neighbours, bool):
            raise TypeError(f"reducer {self.name!r}: neighbours must be an integer, not {self.neighbours!r}")
        if self.neighbours < 0:
            raise ValueError(f"reducer {self.name!r}: neighbours must not be negative, but are {self.neighbours}")

    @property
    def at_most(self) -> bool:
        return self.adaptive

    def __call__(self, context: VisualContext, count: int) -> Selection:
        return self.select_many([context], [count])[0]

    def select_many(self, contexts: Sequence[VisualContext], counts: Sequence[int]) -> list[Selection]:
        if self.adaptive:
            outliers = _outliers(stacked(contexts, "cls_attention"))
            counts = [min(count, (1 + self.spaced) * n + 1) for count, n in zip(counts, outliers, strict=True)]
        return by_count(contexts, counts, self._select)

    def _select(self, contexts: Sequence[VisualContext], _: Tensor, count: int) -> list[Selection]:
        attention = stacked(contexts, "cls_attention")
        order = ranked(attention)
        tokens = order.shape[1]
        if count in (0, tokens):
            return [Selection(row) for row in order[:, :count]]
        attended = -(-(count - 1) // (1 + self.spaced))
        kept = order[:, :attended]
        spaced = count - 1 - attended
        if spaced:
            rest = others(kept, tokens)
            middles = (2 * torch.arange(spaced, device=rest.device) + 1) * rest.shape[1] // (2 * spaced)
            kept = torch.cat([kept, rest[:, middles]], dim=1)
        features = stacked(contexts, "features").to(wide(order.device))
        weights = torch.cat(
            [_neighbour_weights(stacked(contexts, "keys"), attention, kept, self.neighbours), attention[:, None]], dim=1
        ).to(features)
        weights[:, -1].scatter_(1, kept, 0.0)
        weights[:, :-1].scatter_add_(2, kept[..., None], torch.ones_like(weights[:, :-1, :1]))
        places = torch.cat([kept, last_dropped(kept, tokens)], dim=1)
        return merged_selections(contexts, places[:, :0], places, weights @ features)


class PruMergePlusReducer(PruMergeReducer):
    """PruMerge with three evenly spaced tokens for each that is taken by attention."""

    name: ClassVar[str] = "prumerge_plus"
    spaced: ClassVar[int] = SPACED_PER_ATTENDED


def _neighbour_weights(keys: Tensor, attention: Tensor, kept: Tensor, neighbours: int) -> Tensor:
    """(batch, kept, tokens): the attention of each kept token's nearest neighbours, 0 of other tokens."""
    similarity = cosine(rows_of(keys, kept), keys).scatter(2, kept[..., None], -2.0)  # a token is not its own neighbour
    nearest = ranked(similarity)[..., : min(neighbours, keys.shape[1] - 1)]
    own = attention[:, None].expand(-1, kept.shape[1], -1)
    return torch.zeros_like(similarity).scatter(2, nearest, own.gather(2, nearest).to(similarity))


def _outliers(attention: Tensor) -> list[int]:
    attention = attention.double().cpu()
    low, high = (attention.quantile(share, dim=1, keepdim=True) for share in (0.25, 0.75))
    counts: list[int] = (attention > high + 1.5 * (high - low)).sum(dim=1).tolist()
    return counts
