"""The rankings of one forward call: each stage reads its layer and moves the tokens that leave to their group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from dop_compile.policy.ranking import Ranking
from dop_compile.rankings import LayerView, criterion
from dop_compile.runtime.layer_view import StoredLayerView
from dop_compile.runtime.layout import TokenLayout
from dop_compile.runtime.masks import MaskSelector
from dop_compile.spans import SELECTION, span
from dop_compile.tokens import TokenSet

__all__ = ["CallRankings", "observing"]

Observer = Callable[[int, LayerView], None]
_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Show every stage's view to a function, by the stage's number, in this thread; stages that drop nothing too."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


class CallRankings:
    """What the graph's ranking nodes act on.

    Args:
        ranking: of the policy.
        layout: the call's slots; stages change the groups of visual tokens in it.
        selector: the call's masks.
        embeds: (batch, slots, hidden), what entered the decoder.
        past_slots: number of slots before the call.
        newlines: (batch, slots) bool, on the CPU: visual tokens that are neither ranked nor dropped.
    """

    def __init__(
        self,
        ranking: Ranking,
        layout: TokenLayout,
        selector: MaskSelector,
        embeds: Tensor,
        past_slots: int,
        newlines: Tensor,
    ):
        self._criterion = criterion(ranking.criterion, dict(ranking.options))
        self._ranking, self._layout, self._selector = ranking, layout, selector
        self._embeds, self._past_slots = embeds, past_slots
        self._newlines = newlines
        self._memo: dict[str, Tensor] = {}
        self._entered = self._left()

    def _left(self) -> Tensor:
        """(batch, slots) bool, on the CPU: visual tokens that no stage has dropped."""
        return (self._layout.codes == self._layout.universe.groups.index("visual")) & ~self._newlines

    def rank(
        self,
        stage: int,
        module: nn.Module,
        tensors: tuple[Tensor, Tensor, Tensor],
        mask: Any,
        sets: tuple[TokenSet, TokenSet, TokenSet | None],
        settings: Mapping[str, Any],
        stream: Tensor | None,
        held: TokenSet | None,
    ) -> TokenLayout:
        """Run a stage; returns the layout, in which the tokens that leave have their group."""
        layout, rule = self._layout, self._ranking.stages[stage]
        left = self._left()
        counts = [
            min(rule.count(entered), now)
            for entered, now in zip(self._entered.sum(1).tolist(), left.sum(1).tolist(), strict=True)
        ]
        observe = _observer.get()
        if counts == left.sum(1).tolist() and observe is None:
            return layout
        kept = torch.zeros_like(left)
        if any(counts):
            query, key, value = (tensor.detach() for tensor in tensors)
            queries, keys, among = sets
            with span(SELECTION), torch.no_grad():
                view = StoredLayerView(
                    layout,
                    module,
                    query,
                    key,
                    value,
                    mask,
                    queries,
                    keys if among is None else among,
                    self._selector.entries(rule.layer + self._criterion.reads_next, keys, among),
                    self._past_slots,
                    settings,
                    self._embeds.detach(),
                    self._entered,
                    left,
                    None if stream is None else stream.detach(),
                    held,
                    self._memo,
                )
                if observe is not None:
                    observe(stage, view)
                kept = self._criterion(view, counts).cpu()
        layout.assign(left & ~kept, rule.group)
        return layout
