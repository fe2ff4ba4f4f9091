"""Rows and columns of the model's own attention mask for one layer's queries and keys.

The mask is built by Hugging Face over slots (the sequence after reduction), so padding, windows and bidirectional
image blocks are the model's own. A layer takes the rows of its queries and the columns of what it stores; entries
that are padding are masked out. Where the model builds no mask (plain causal attention) none is made unless the
layer's queries and keys differ, because then a kernel's causal flag would be aligned wrongly.

FlexAttention takes masks as functions (`block_masks`); FlashAttention takes none, but runs of queries (`flash`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dop_compile.identity import Same
from dop_compile.runtime.block_masks import BlockMask, gathered_block_mask
from dop_compile.runtime.entries import Entries
from dop_compile.runtime.flash import FlashTokens
from dop_compile.runtime.layout import TokenLayout
from dop_compile.tokens import TokenSet

__all__ = ["MaskSelector", "additive"]


_NOTHING = object()


def additive(visible: Tensor, like: Tensor) -> Tensor:
    """A boolean mask as eager attention takes it: 0 where it is True, the lowest number of `like`'s dtype elsewhere."""
    zero = torch.zeros((), dtype=like.dtype, device=like.device)
    return torch.where(visible, zero, torch.finfo(like.dtype).min)


class MaskSelector:
    """Selects masks for one forward call; layers with the same sets and the same past share one.

    Args:
        layout: the call's new slots.
        past: entries that each layer holds before the call.
        past_slots: number of slots before the call.
        flash: whether the kernel is FlashAttention.
        has_gaps: whether tokens were removed, so that positions do not tell packed sequences.
    """

    def __init__(
        self,
        layout: TokenLayout,
        past: dict[int, Entries],
        past_slots: int,
        *,
        flash: bool = False,
        has_gaps: bool = False,
    ):
        self._flash = flash
        self._has_gaps = has_gaps
        self._layout = layout
        self._past = past
        self._past_slots = past_slots
        self._memo: dict[Any, Any] = {}
        self._appended: dict[Any, Entries] = {}
        # Most layers ask for what the one before asked for
        self._last_entries: tuple[Any, Any, Any, Any] = (_NOTHING, None, None, None)
        self._last: tuple[Any, Any, Any, Any] = (_NOTHING, None, None, None)

    def entries(self, layer: int, keys: TokenSet, among: TokenSet | None = None) -> Entries:
        """What the layer reads after the call; equal histories give the same object.

        Args:
            keys: the new tokens whose keys it sees.
            among: those whose keys are stored where it reads them, if more.
        """
        past = self._past.get(layer)
        same_past, same_keys, same_among, entries = self._last_entries
        if past is same_past and keys is same_keys and among is same_among:
            known: Entries = entries
            return known
        key = (Same(past), keys, among)
        if key not in self._appended:
            held = keys if among is None else among
            slots, valid = (None, None) if keys.is_all else self._layout.device_slots(held)
            seen = None if among is None else self._layout.device_members(keys, among)
            count = self._layout.count(held)
            self._appended[key] = (past or Entries()).append(self._past_slots, count, slots, valid, seen)
        self._last_entries = past, keys, among, self._appended[key]
        return self._appended[key]

    def padding(self, tokens: TokenSet) -> Tensor | None:
        """(batch, count) of 0 and 1: which positions of a mixer's sequence hold a token; None where all do."""
        key = ("padding", tokens)
        if key not in self._memo:
            _, valid = self._layout.device_slots(tokens)
            self._memo[key] = None if valid is None else valid.long()
        result: Tensor | None = self._memo[key]
        return result

    def select(
        self, mask: Any, layer: int, queries: TokenSet, keys: TokenSet, among: TokenSet | None = None
    ) -> tuple[Any, Tensor | None]:
        """The layer's mask (batch, 1, queries, entries), and which queries see a key (batch, queries); see `entries`.

        The mask is None where the kernel needs none, the second where every query sees a key. The mask is the model's
        own, untouched, where every slot is a query and every slot is stored.
        """
        entries = self.entries(layer, keys, among)
        result: tuple[Any, Tensor | None]
        same_mask, same_queries, same_entries, result = self._last
        if mask is same_mask and queries is same_queries and entries is same_entries:
            return result
        if queries.is_all and entries.slots is None and not (self._flash and self._has_gaps):
            self._last = mask, queries, entries, (mask, None)
            return mask, None
        key = (Same(mask), queries, Same(entries))
        if key not in self._memo:
            self._memo[key] = self._select(mask, queries, keys, entries)
        result = self._memo[key]
        self._last = mask, queries, entries, result
        return result

    def _select(self, mask: Any, queries: TokenSet, keys: TokenSet, entries: Entries) -> tuple[Any, Tensor | None]:
        rows, rows_valid = self._layout.device_slots(queries)
        if self._flash:
            last = self._layout.slots(queries)[0].numpy()[:, -1]
            at_end = bool((last == self._layout.length - 1).all())
            return FlashTokens(rows + self._past_slots, rows_valid, entries, mask, at_end), None
        if isinstance(mask, BlockMask):
            return gathered_block_mask(mask, rows, entries, some_keyless=not queries <= keys)
        if mask is None:
            if self._layout.length == 1 and entries.visible is None:
                return None, None
            if queries == keys and entries.count == rows.shape[1] and rows_valid is None and entries.visible is None:
                return None, None
            columns = self._columns(entries, rows)
            selected = columns[:, None, None, :] <= (rows + self._past_slots)[:, None, :, None]
        else:
            selected = _take(_take(mask, None if queries.is_all else rows, 2), entries.slots, 3)
        some_keyless = self._layout.has_padding or not queries <= keys
        if entries.visible is None and rows_valid is None and not some_keyless:
            return selected, None
        visible = selected if selected.dtype == torch.bool else selected > torch.finfo(selected.dtype).min / 2
        if entries.visible is not None:
            visible = visible & entries.visible[:, None, None, :]
            if selected.dtype == torch.bool:
                selected = visible
            else:
                selected = selected.masked_fill(~visible, torch.finfo(selected.dtype).min)
        return selected, visible.any(dim=-1).any(dim=1) if some_keyless or rows_valid is not None else None

    def _columns(self, entries: Entries, rows: Tensor) -> Tensor:
        if entries.slots is not None:
            return entries.slots
        return torch.arange(entries.count, device=rows.device).expand(rows.shape[0], -1)


def _take(mask: Tensor, index: Tensor | None, dim: int) -> Tensor:
    if index is None:
        return mask
    if index.shape[0] == 1:
        return mask.index_select(dim, index[0])
    mask = mask.expand(index.shape[0], -1, -1, -1)
    shape = [index.shape[0], 1, 1, 1]
    shape[dim] = index.shape[1]
    return torch.take_along_dim(mask, index.view(shape), dim=dim)
