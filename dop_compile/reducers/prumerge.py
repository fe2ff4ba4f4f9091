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
from dop_compile.reducers.merging import MERGED_FIELDS, last_dropped, merged_selections, others, pieces
from dop_compile.reducers.numbers import at_once, by_count, cosine, order_keys, ranked, rows_of, stacked, wide

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
    name = "prumerge"
    requires = MERGED_FIELDS | {"cls_attention", "keys"}
    per_tile = True
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
        return by_count(contexts, counts, self._select, at_once(contexts, "features"))

    def _select(self, contexts: Sequence[VisualContext], count: int) -> list[Selection]:
        attention = stacked(contexts, "cls_attention")
        order = ranked(attention.detach())
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
        features = stacked(contexts, "features")
        weights = attention.to(wide(order.device))
        keys = stacked(contexts, "keys").detach()
        neighbours = min(self.neighbours, tokens - 1)
        merged = [
            _with_neighbours(features, weights, part, _nearest(keys, part, neighbours))
            for part in kept.split(pieces(features, max(tokens, neighbours * features.shape[2])), dim=1)
        ]
        merged.append(_sum(features, weights.scatter(1, kept, 0.0)))
        places = torch.cat([kept, last_dropped(kept, tokens)], dim=1)
        return merged_selections(contexts, places[:, :0], places, torch.cat(merged, dim=1))


class PruMergePlusReducer(PruMergeReducer):
    """PruMerge with three evenly spaced tokens for each that is taken by attention."""

    name = "prumerge_plus"
    spaced: ClassVar[int] = SPACED_PER_ATTENDED


def _nearest(keys: Tensor, kept: Tensor, neighbours: int) -> Tensor:
    """(batch, kept, neighbours) other tokens of the most similar keys (batch, tokens, key_dim); ties: lowest index."""
    similarity = cosine(rows_of(keys, kept), keys).scatter(2, kept[..., None], -2.0)  # a token is not its own neighbour
    return order_keys(similarity).topk(neighbours, dim=2).indices


def _with_neighbours(features: Tensor, weights: Tensor, kept: Tensor, nearest: Tensor) -> Tensor:
    """(batch, kept, vision_hidden): each kept token plus the weighted sum of its nearest (batch, kept, neighbours)."""
    batch, count, neighbours = nearest.shape
    flat = nearest.flatten(1)
    rows = rows_of(features, flat).to(weights).view(batch, count, neighbours, features.shape[2])
    own = weights.gather(1, flat).view(batch, count, 1, neighbours)
    return rows_of(features, kept).to(weights) + (own @ rows)[:, :, 0]


def _sum(features: Tensor, weights: Tensor) -> Tensor:
    """(batch, 1, vision_hidden) sum of features weighted by (batch, tokens)."""
    step = pieces(features)
    parts = zip(weights.split(step, dim=1), features.split(step, dim=1), strict=True)
    return torch.stack([own[:, None] @ some.to(weights) for own, some in parts]).sum(dim=0)


def _outliers(attention: Tensor) -> list[int]:
    attention = attention.detach().double().cpu()
    low, high = (attention.quantile(share, dim=1, keepdim=True) for share in (0.25, 0.75))
    counts: list[int] = (attention > high + 1.5 * (high - low)).sum(dim=1).tolist()
    return counts
