"""What a ranking inside the decoder is: it reads one layer and says which visual tokens stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from dop_compile.rankings.view import LayerView

__all__ = ["Criterion", "best"]


@runtime_checkable
class Criterion(Protocol):
    """Which visual tokens stay after a layer.

    Attributes:
        raters: token groups whose queries it reads at the layer (`text`, `visual`).
        keys: token groups whose keys it reads there.
        reads_stream: whether it reads the residual stream behind the layer, and not only its queries and keys.
        reads_next: whether the queries and keys are those that the next layer makes of all tokens that leave this one.
    """

    raters: frozenset[str]
    keys: frozenset[str]
    reads_stream: bool
    reads_next: bool

    def __call__(self, view: LayerView, counts: Sequence[int]) -> Tensor:
        """(batch, slots) bool: `counts[row]` of the row's `view.candidates`."""
        ...


def best(scores: Tensor, candidates: Tensor, counts: Sequence[int]) -> Tensor:
    """The highest scores of each row: (batch, slots) bool. Equal scores: the token that comes first."""
    scores = scores.float().masked_fill(~candidates, float("-inf"))
    places = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (places < places.new_tensor(list(counts))[:, None]) & candidates
