"""CDPruner: diverse tokens that matter for the instruction (Zhang et al. 2025, arXiv 2506.10967).

Per image, the relevance r_i of its tokens to the text is scaled to (r - min + 1e-6) / (max - min), over all its tiles.
Then, per tile or frame, tokens are chosen by greedy maximum a posteriori inference of a determinantal point process
with the kernel r_i S_ij r_j, S being the cosines of the features after the projector.

Any T from 0 to N. Ties go to the lowest index, also where the tokens chosen so far explain all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dop_compile.reducers.base import Selection, VisualContext
from dop_compile.reducers.greedy import diverse_tokens
from dop_compile.reducers.relevance import InstructionRelevance, Relevance, check_relevance

__all__ = ["CDPrunerReducer"]

SMALLEST = 1e-6


@dataclass(frozen=True)
class CDPrunerReducer:
    """Ranks tokens in the order in which they are chosen, so that a smaller count keeps a subset of a larger.

    Args:
        relevance: how relevance is measured. Not an option of a policy: for CLIP's, make the reducer known by
            `register("cdpruner_clip", functools.partial(CDPrunerReducer, ClipRelevance(...)))`.

    Raises:
        TypeError: no measure of relevance.
    """

    relevance: Relevance = field(default_factory=InstructionRelevance)
    name = "cdpruner"
    per_tile = True

    def __post_init__(self) -> None:
        check_relevance("cdpruner", self.relevance)

    @property
    def requires(self) -> frozenset[str]:
        return self.relevance.requires

    def __call__(self, context: VisualContext, count: int) -> Selection:
        return self.select_many(self.prepare([context]), [count])[0]

    @torch.no_grad()
    def prepare(self, contexts: Sequence[VisualContext]) -> list[VisualContext]:
        scores = self.relevance(contexts)
        return [replace(c, relevance=_scaled(score)) for c, score in zip(contexts, scores, strict=True)]

    def select_many(self, contexts: Sequence[VisualContext], counts: Sequence[int]) -> list[Selection]:
        order = diverse_tokens(contexts, max(counts))
        return [Selection(row[:count]) for row, count in zip(order, counts, strict=True)]


def _scaled(scores: Tensor) -> Tensor:
    if not len(scores):
        return scores
    low, high = scores.amin(), scores.amax()
    # A range of nothing is that of equal tokens, which are equally relevant
    return (scores - low + SMALLEST) / (high - low).clamp(min=SMALLEST)
