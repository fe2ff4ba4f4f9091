"""TRIM: tokens that are relevant to the text, and the mean of the others (Song et al. 2024, arXiv 2409.10994).

Per image with its tiles, or per video, T tokens are kept: the T - 1 most relevant, and one that is the mean of all
dropped tokens before the projector, at the place of the last of them. The softmax that the paper takes over the scores
changes no rank. All tokens (T = N) are kept as they are.

Any T from 0 to N. Ties go to the lowest index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from dop_compile.reducers.base import Selection, VisualContext
from dop_compile.reducers.merging import MERGED_FIELDS, merged_selections, others, pieces
from dop_compile.reducers.numbers import at_once, by_count, ranked, rows_of, stacked, wide
from dop_compile.reducers.relevance import InstructionRelevance, Relevance, check_relevance

__all__ = ["TrimReducer"]


@dataclass(frozen=True)
class TrimReducer:
    """Ranks tokens by relevance, the mean of the others last.

    Args:
        relevance: how relevance is measured, as for `CDPrunerReducer`; the paper's is `ClipRelevance`.

    Raises:
        TypeError: no measure of relevance.
    """

    relevance: Relevance = field(default_factory=InstructionRelevance)
    name = "trim"

    def __post_init__(self) -> None:
        check_relevance("trim", self.relevance)

    @property
    def requires(self) -> frozenset[str]:
        return self.relevance.requires | MERGED_FIELDS

    def __call__(self, context: VisualContext, count: int) -> Selection:
        return self.select_many(self.prepare([context]), [count])[0]

    def prepare(self, contexts: Sequence[VisualContext]) -> list[VisualContext]:
        with torch.no_grad():  # it only ranks
            scores = self.relevance(contexts)
        return [replace(context, relevance=score) for context, score in zip(contexts, scores, strict=True)]

    def select_many(self, contexts: Sequence[VisualContext], counts: Sequence[int]) -> list[Selection]:
        return by_count(contexts, counts, _select, at_once(contexts, "features"))


def _select(contexts: Sequence[VisualContext], count: int) -> list[Selection]:
    order = ranked(stacked(contexts, "relevance"))
    tokens = order.shape[1]
    if count in (0, tokens):
        return [Selection(row) for row in order[:, :count]]
    kept = order[:, : count - 1]
    features, dropped = stacked(contexts, "features"), others(kept, tokens)
    parts = dropped.split(pieces(features), dim=1)
    sums = [rows_of(features, part).to(wide(features.device)).sum(dim=1, keepdim=True) for part in parts]
    total = torch.stack(sums).sum(dim=0)
    return merged_selections(contexts, kept, dropped[:, -1:], total / dropped.shape[1])
