"""The product's reducers on one picture of vLLM's, as its vision tower and projector made it."""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import torch
from torch import Tensor

from dop_compile.plugins.vllm.policies import reads_values
from dop_compile.plugins.vllm.shares import Share
from dop_compile.policy.policy import Policy
from dop_compile.reducers import create
from dop_compile.reducers.base import VisualContext
from dop_compile.reducers.select import needs

__all__ = ["Selector"]


class Selector:
    """Chooses which tokens of a picture enter.

    Args:
        policy: its `visual_tokens` is set.
    """

    def __init__(self, policy: Policy) -> None:
        self._reducer: Any = create(policy.reducer, policy.options)
        self.reads_values = reads_values(policy)
        self.needs_attention = "cls_attention" in needs(self._reducer)

    def fixed(self, share: Share) -> Tensor:
        """(kept,) ascending numbers of embeddings, for reducers that read no values."""
        assert not self.reads_values
        return _by_numbers(self._reducer, share)

    def choose(self, share: Share, features: Tensor, before: Tensor | None, attention: Tensor | None) -> Tensor:
        """(kept,) ascending numbers of embeddings, on their device.

        Args:
            share: of the picture.
            features: (tokens, hidden) after the projector.
            before: (tokens, vision_hidden) what it was given, where that is needed.
            attention: (tokens,) that [CLS] pays to each, where that is needed.
        """
        droppable = (~share.layout.is_newline).to(features.device)
        projected = features[droppable]
        fields: dict[str, Any] = {}
        if self.needs_attention:
            assert before is not None
            assert attention is not None
            tiles = torch.zeros(len(projected), dtype=torch.long)
            # visionzip asks for keys and the projector, and uses them for merged tokens, of which there are none
            fields = {"features": before, "cls_attention": attention, "tiles": tiles, "keys": before, "project": _none}
        context = _context(projected, share, **fields)
        return _with_newlines(share, self._reducer(context, share.count).indices.to(features.device))


@functools.lru_cache(maxsize=1024)
def _by_numbers(reducer: Any, share: Share) -> Tensor:
    empty = torch.zeros(share.layout.tokens - share.layout.newlines, 0)
    return _with_newlines(share, reducer(_context(empty, share), share.count).indices)


def _context(projected: Tensor, share: Share, **fields: Any) -> VisualContext:
    segments = torch.zeros(len(projected), dtype=torch.long, device=projected.device)
    text = projected.new_zeros(0, projected.shape[1])
    return VisualContext(projected, text, segments, 0, segment_index=share.number, **fields)


def _with_newlines(share: Share, indices: Tensor) -> Tensor:
    """Chosen ones of the tokens that can be dropped, as numbers of embeddings, with those that never are."""
    enters = share.layout.is_newline.to(indices.device)
    enters[(~enters).nonzero().flatten()[indices]] = True
    return enters.nonzero().flatten()


def _none(_: Tensor) -> NoReturn:
    raise AssertionError("no tokens are merged")
