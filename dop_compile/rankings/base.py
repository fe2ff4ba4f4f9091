"""What a ranking inside the decoder is: it reads one layer and says which visual tokens stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from dop_compile.transfer import to_device

__all__ = ["Criterion", "LayerView", "best", "slots_of"]


class LayerView(Protocol):
    """One layer of one forward call, as a ranking reads it. A slot is a token of the call, in its order.

    Attributes:
        device: of the layer's keys.
        embeds: (batch, slots, hidden), what entered the decoder.
        entered, left: (batch, slots) bool, on the CPU: the visual tokens that entered, and those that are left.
    """

    embeds: Tensor
    entered: Tensor
    left: Tensor

    @property
    def device(self) -> torch.device: ...

    @property
    def candidates(self) -> Tensor:
        """(batch, slots) bool: the visual tokens that are left."""
        ...

    @property
    def last(self) -> Tensor:
        """(batch, slots) bool, on the CPU: the prompt's last token that is a query here."""
        ...

    def group(self, name: str) -> Tensor:
        """(batch, slots) bool, on the CPU: the tokens of a group; `visual` are those that are left."""
        ...

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What is the same in all stages of a call, by name."""
        ...

    def received(self, rows: Tensor, weights: Tensor | None = None, *, heads: str = "mean") -> Tensor:
        """(batch, slots) float32: attention that each slot receives from `rows`, summed over rows.

        Args:
            rows: (batch, slots) bool, on the CPU, tokens that are queries of the layer.
            weights: (batch, slots), a weight of each row.
            heads: of an attention weight, the `mean` over the heads or their `max`.
        """
        ...

    def new_keys(self) -> Tensor:
        """(batch, slots, KV heads x head dimension): the layer's keys; zeros for tokens that supply none."""
        ...

    def states(self) -> Tensor:
        """(batch, slots, hidden): the residual stream behind the layer; zeros for tokens that it was not read for."""
        ...

    def on_slots(self, values: Tensor) -> Tensor:
        """Values (batch, keys, ...) of the call's keys on the slots' grid."""
        ...


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
    return (places < to_device([np.array(counts)], places.device)[0][:, None]) & candidates


def slots_of(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Slots of some tokens, right-aligned per row, and which are such tokens: (batch, count), from (batch, slots) bool.

    All on the CPU; `count` is the largest number in a row, and at least one.
    """
    width = max(int(tokens.sum(dim=1).max()), 1)
    slots = torch.argsort(tokens.to(torch.int8), dim=1, stable=True)[:, tokens.shape[1] - width :]
    return slots, tokens.gather(1, slots)
