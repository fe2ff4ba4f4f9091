"""VisPruner: tokens that [CLS] attends to, and a diverse choice of the rest (Zhang et al. 2025, arXiv 2412.01818).

Per image, tile or frame, of N tokens T are kept, of which T_imp = int(T * ratio) are important:

1. the T_imp tokens of the highest [CLS] attention;
2. of the rest, in the order of their attention, tokens that resemble others are removed until T - T_imp remain: the
   list is split in its even and its odd places; each token of an even place scores its highest cosine to one of an odd
   place (features before the projector); the k = min(8, surplus) highest are removed; the others follow by descending
   score, and then those of the odd places.

Any T from 0 to N. Ties go to the lowest index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dop_compile.reducers.base import Selection, VisualContext
from dop_compile.reducers.cosines import Cosines
from dop_compile.reducers.nearest import NearestTokens
from dop_compile.reducers.numbers import LARGE, at_once, by_count, cosine, fraction, order_keys, ranked, stacked

__all__ = ["VisPrunerReducer"]

REMOVED_AT_ONCE = 8
REBUILD = 4
"""Lists of near tokens are made anew when so many times fewer tokens are left."""


@dataclass(frozen=True)
class VisPrunerReducer:
    """Ranks the important tokens first, by attention, then the diverse ones in the order that removal leaves.

    Args:
        ratio: share of the kept tokens that are important ones.

    Raises:
        TypeError, ValueError: a ratio that is not a number from 0 to 1.
    """

    ratio: float = 0.5
    name = "vispruner"
    requires = frozenset({"features", "cls_attention"})
    per_tile = True

    def __post_init__(self) -> None:
        fraction("vispruner", "ratio", self.ratio)

    def __call__(self, context: VisualContext, count: int) -> Selection:
        return self.select_many([context], [count])[0]

    @torch.no_grad()
    def select_many(self, contexts: Sequence[VisualContext], counts: Sequence[int]) -> list[Selection]:
        return by_count(contexts, counts, self._select, at_once(contexts, "features"))

    def _select(self, contexts: Sequence[VisualContext], count: int) -> list[Selection]:
        order = ranked(stacked(contexts, "cls_attention"))
        important = int(count * self.ratio)
        rest, keep = order[:, important:], count - important
        features = stacked(contexts, "features")
        if order.shape[1] <= LARGE:
            diverse = _diverse(cosine(features), rest, keep)
        else:
            diverse = torch.stack([_diverse_of_many(*each, keep) for each in zip(features, rest, strict=True)])
        return [Selection(row) for row in torch.cat([order[:, :important], diverse], dim=1)]


def _diverse(similarity: Tensor, order: Tensor, keep: int) -> Tensor:
    """(units, keep) of the tokens in `order` (units, rest), by their similarity (units, tokens, tokens)."""
    if keep == 0:
        return order[:, :0]
    tokens = similarity.shape[-1]
    first = torch.arange(len(order), device=order.device)[:, None] * tokens
    while (surplus := order.shape[1] - keep) > 0:
        even, odd = order[:, 0::2], order[:, 1::2]
        if odd.shape[1]:
            # Highest similarity of every token to one of an odd place; whole rows are read, which is faster than parts
            to_odd = similarity.view(-1, tokens).index_select(0, (odd + first).flatten())
            scores = to_odd.view(*odd.shape, tokens).amax(dim=1).gather(1, even)
            by_index = even.argsort(dim=1)
            by_score = ranked(scores.gather(1, by_index))
            even = even.gather(1, by_index).gather(1, by_score)
        order = torch.cat([even[:, min(REMOVED_AT_ONCE, surplus) :], odd], dim=1)
    return order


def _diverse_of_many(features: Tensor, order: Tensor, keep: int) -> Tensor:
    """`_diverse` for one image, by the near tokens of each: (keep,) of `order` (rest,)."""
    if keep == 0 or keep == len(order):
        return order[:keep]
    tokens = order.cpu().sort().values
    places = torch.searchsorted(tokens, order.cpu()).numpy()
    nearest, built = NearestTokens(Cosines(features), tokens), len(tokens)
    inside = np.zeros(len(tokens) + 1, dtype=bool)
    while (surplus := len(places) - keep) > 0:
        if len(places) <= built // REBUILD:
            nearest.rebuild(places)
            built = len(places)
        even, odd = places[0::2], places[1::2]
        inside[odd] = True
        scores = nearest.highest(even, inside)
        inside[odd] = False
        # Sorting keys that hold the place is several times as fast as asking for the order of the scores
        keys = np.sort(order_keys(torch.from_numpy(scores), torch.from_numpy(even)).numpy())[::-1]
        places = np.concatenate([(-keys & 0xFFFFFFFF)[min(REMOVED_AT_ONCE, surplus) :], odd])
    return tokens[torch.from_numpy(places)].to(order.device)
