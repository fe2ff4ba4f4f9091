"""Keep what is least like a few pivots (DART, arXiv 2502.11494)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dop_compile.checks import integer
from dop_compile.rankings.base import LayerView

__all__ = ["Pivots"]


class Pivots:
    """The visual and the text tokens with the largest keys (L1 norm) are pivots; visual pivots stay.

    Then each pivot in turn, visual ones first, keeps the tokens left that are least similar to it (cosine of their
    states behind the layer): an equal share of what remains to be kept, the first pivots one more where it does not
    divide. The authors' code takes the cosines of the decoder's final norm of these states; here they are as they are.

    Args:
        visual, text: numbers of pivots.
    """

    raters = frozenset({"text"})
    keys = frozenset({"visual", "text"})
    reads_stream = True
    reads_next = False

    def __init__(self, visual: int = 4, text: int = 4):
        self.visual = integer("pivots: visual", visual, low=0)
        self.text = integer("pivots: text", text, low=0)
        if not visual + text:
            raise ValueError("pivots: expected at least one pivot, got none")

    def __call__(self, view: LayerView, counts: Sequence[int]) -> Tensor:
        kept = torch.zeros_like(view.candidates)
        norms = view.new_keys().float().abs().sum(dim=2)
        states = torch.nn.functional.normalize(view.states().float(), dim=2)
        text = view.group("text")
        texts, words = text.to(view.device), text.sum(dim=1).tolist()
        # All numbers are the CPU's, so that an accelerator is not waited for
        for row, (count, word_count) in enumerate(zip(counts, words, strict=True)):
            text_pivots = _highest(norms[row], texts[row], min(self.text, word_count))
            kept[row] = self._row(norms[row], states[row], view.candidates[row], text_pivots, count)
        return kept

    def _row(self, norms: Tensor, states: Tensor, candidates: Tensor, text_pivots: Tensor, count: int) -> Tensor:
        """(slots,) bool: `count` of the candidates, of which there are as many at least."""
        visual_pivots = _highest(norms, candidates, min(self.visual, count))
        pivots = torch.cat([visual_pivots, text_pivots])
        left = candidates.clone()
        left[visual_pivots] = False
        missing = count - len(visual_pivots)
        if missing and not len(pivots):  # no text at all: what has the largest keys
            left[_highest(norms, left, missing)] = False
            return candidates & ~left
        share, more = divmod(missing, max(len(pivots), 1))
        similarity = states @ states[pivots].T
        for number in range(len(pivots)):
            take = min(share + (number < more), missing)
            if take:
                left[_highest(-similarity[:, number], left, take)] = False
        return candidates & ~left


def _highest(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """Indices of the highest scores among some tokens, no fewer than `count`; equal ones in order."""
    return scores.masked_fill(~among, float("-inf")).argsort(descending=True, stable=True)[:count]
