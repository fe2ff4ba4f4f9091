"""DivPrune: tokens far from each other (Alvar et al. 2025, arXiv 2503.02175).

The distance of two tokens is 1 - cosine of the features that enter the decoder. The first token is the one whose
nearest neighbour is farthest away; then always the token is taken that is farthest from all chosen ones. Over a whole
image with its tiles, or a whole video.

Any T from 0 to N. Ties go to the lowest index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dop_compile.reducers.base import Selection, VisualContext
from dop_compile.reducers.greedy import far_tokens

__all__ = ["DivPruneReducer"]


@dataclass(frozen=True)
class DivPruneReducer:
    """Ranks tokens in the order in which they are chosen, so that a smaller count keeps a subset of a larger."""

    name = "divprune"
    requires = frozenset[str]()

    def __call__(self, context: VisualContext, count: int) -> Selection:
        return self.select_many([context], [count])[0]

    def select_many(self, contexts: Sequence[VisualContext], counts: Sequence[int]) -> list[Selection]:
        order = far_tokens(contexts, max(counts))
        return [Selection(row[:count]) for row, count in zip(order, counts, strict=True)]
