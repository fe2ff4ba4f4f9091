"""What a ranking sees of one layer: attention rows of a few queries, keys, and the stream, all on the slots' grid.

Fused attention stays on: rows are computed from the queries and keys that the layer has computed anyway, by the model's
own eager attention (with its scale, soft cap and sinks), for the rows that are asked for, some at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dop_compile.errors import UnsupportedUsageError
from dop_compile.hf.kernels import eager_attention
from dop_compile.hf.names import NOT_OF_EAGER
from dop_compile.rankings.base import slots_of
from dop_compile.runtime.block_masks import BlockMask
from dop_compile.runtime.entries import Entries
from dop_compile.runtime.flash import FlashTokens
from dop_compile.runtime.layout import NO_TOKEN, TokenLayout
from dop_compile.runtime.masks import additive
from dop_compile.tokens import TokenSet
from dop_compile.transfer import to_device

__all__ = ["StoredLayerView"]

ROWS_AT_ONCE = 256


@dataclass
class StoredLayerView:
    """One layer of one call: a `dop_compile.rankings.LayerView`.

    Args:
        layout: the call's slots.
        module: the layer's attention module.
        query: (batch, heads, queries, head dimension), laid out as `queries`.
        key, value: (batch, KV heads, entries, head dimension): past entries, then those of `keys`.
        mask: what the layer's kernel was given: (batch, 1, queries, entries), FlexAttention's function of queries and
            entries, FlashAttention's runs, (batch, columns) of padding, or None.
        entries: what the layer holds, the call's own keys included.
        past_slots: slots before the call.
        settings: the kernel's keyword arguments.
        embeds: (batch, slots, hidden), what entered the decoder.
        entered, left: (batch, slots) bool, on the CPU: the visual tokens that entered, and those that are left.
        stream: (batch, held, hidden) residual stream behind the layer, laid out as `held`; None if not asked for.
        memo: what `once` has computed; shared by the stages of a call.
    """

    layout: TokenLayout
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    queries: TokenSet
    keys: TokenSet
    entries: Entries
    past_slots: int
    settings: Mapping[str, Any]
    embeds: Tensor
    entered: Tensor
    left: Tensor
    stream: Tensor | None = None
    held: TokenSet | None = None
    memo: dict[str, Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.key.device

    @cached_property
    def candidates(self) -> Tensor:
        """(batch, slots) bool: the visual tokens that are left."""
        return to_device([self.left.numpy()], self.device)[0]

    def group(self, name: str) -> Tensor:
        """(batch, slots) bool, on the CPU: the tokens of a group; `visual` are those that are left."""
        groups = self.layout.universe.groups
        if name == "visual":
            return self.left
        number = groups.index(name) if name in groups else NO_TOKEN - 1
        return self.layout.codes == number

    @cached_property
    def last(self) -> Tensor:
        """(batch, slots) bool, on the CPU: the prompt's last token that is a query here."""
        members = self.layout.members(self.queries) & (self.layout.codes != NO_TOKEN) & ~self.group("output")
        slots = torch.arange(members.shape[1], device="cpu")
        last = torch.where(members, slots, -1).amax(dim=1, keepdim=True)
        return (slots == last) & members

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What is the same in all stages of a call, by name."""
        if name not in self.memo:
            self.memo[name] = make()
        return self.memo[name]

    def received(self, rows: Tensor, weights: Tensor | None = None, *, heads: str = "mean") -> Tensor:
        """(batch, slots) float32: attention that each slot receives from `rows`, summed over rows.

        Args:
            rows: (batch, slots) bool, on the CPU, tokens that are queries of the layer.
            weights: (batch, slots), a weight of each row.
            heads: of an attention weight, the `mean` over the heads or their `max`.
        """
        slots, valid = slots_of(rows)
        places = self.layout.positions(self.queries).gather(1, slots)
        arrays = [tensor.numpy() for tensor in (slots, valid, places)]
        slots, valid, places = to_device(arrays, self.device)
        weight = valid.to(torch.float32)
        if weights is not None:
            weight = weight * weights.float().gather(1, slots)
        total = weight.new_zeros(weight.shape[0], self.key.shape[2])
        for start in range(0, slots.shape[1], ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            attention = self._attention(slots[:, part], places[:, part], heads)
            # Rows that only fill the grid, such as padding, may hold NaN, which a weight of 0 does not take out
            attention = attention.masked_fill((weight[:, part] == 0)[:, :, None], 0.0)
            total += torch.einsum("br,bre->be", weight[:, part], attention)
        return self.on_slots(total[:, -self._new_entries :, None]).squeeze(-1)

    def new_keys(self) -> Tensor:
        """(batch, slots, KV heads x head dimension): the layer's keys; zeros for tokens that supply none."""
        new = self.key[:, :, -self._new_entries :]
        return self.on_slots(new.transpose(1, 2).flatten(2))

    def states(self) -> Tensor:
        """(batch, slots, hidden): the residual stream behind the layer; zeros for tokens that it was not read for."""
        assert self.stream is not None
        assert self.held is not None
        return self._spread(self.stream, self.held)

    def on_slots(self, values: Tensor) -> Tensor:
        """Values (batch, keys, ...) of the call's keys on the slots' grid."""
        return self._spread(values, self.keys)

    # --- one part of the map --------------------------------------------------------------------------------------

    @property
    def _new_entries(self) -> int:
        return self.layout.count(self.keys)

    def _spread(self, values: Tensor, tokens: TokenSet) -> Tensor:
        if tokens.is_all:
            return values
        slots, valid = self.layout.device_slots(tokens)
        if valid is not None:
            values = values * valid[..., None]
        spread = values.new_zeros(values.shape[0], self.layout.length, values.shape[2])
        return spread.scatter_add(1, slots[..., None].expand_as(values), values)

    def _attention(self, slots: Tensor, places: Tensor, heads: str) -> Tensor:
        """(batch, rows, entries) float32 weights of queries at `places` of their grid; `heads` as in `received`."""
        eager = eager_attention(self.module)
        assert eager is not None
        query = self.query.gather(2, places[:, None, :, None].expand(-1, self.query.shape[1], -1, self.query.shape[3]))
        mask = self._mask(slots, places)
        settings = {name: value for name, value in self.settings.items() if name not in NOT_OF_EAGER}
        weights: Tensor = eager(self.module, query, self.key, self.value, mask, dropout=0.0, **settings)[1]
        weights = weights[..., : self.key.shape[2]].float()
        return weights.amax(dim=1) if heads == "max" else weights.mean(dim=1)

    def _mask(self, slots: Tensor, places: Tensor) -> Tensor:
        """(batch, 1, rows, entries), 0 where a row sees an entry and the lowest number elsewhere."""
        mask = self.mask
        if isinstance(mask, BlockMask):
            return additive(self._of_function(mask, places), self.query)
        if isinstance(mask, FlashTokens):
            mask = mask.padding
        if isinstance(mask, Tensor) and mask.dim() == 4:
            mask = mask.expand(slots.shape[0], -1, -1, -1)
            rows = mask.gather(2, places[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
            return rows if rows.dtype != torch.bool else additive(rows, self.query)
        if mask is not None and not isinstance(mask, Tensor):
            raise UnsupportedUsageError(
                f"a ranking inside the decoder cannot read a {type(mask).__name__}; load the model with "
                "attn_implementation='sdpa' or 'eager'"
            )
        columns = self.entries.slots
        if columns is None:
            columns = torch.arange(self.entries.count, device=slots.device).expand(slots.shape[0], -1)
        distance = (slots + self.past_slots)[:, :, None] - columns[:, None]
        visible = distance >= 0
        if (window := self.settings.get("sliding_window")) is not None:
            visible = visible & (distance < window)
        if mask is not None:
            visible = visible & mask.bool().gather(1, columns)[:, None]
        if self.entries.visible is not None:
            visible = visible & self.entries.visible[:, None]
        return additive(visible[:, None], self.query)

    def _of_function(self, mask: BlockMask, places: Tensor) -> Tensor:
        """(batch, 1, rows, entries) bool, by the function of a mask, which knows padding and gaps."""
        size = (*places.shape, self.key.shape[2])
        rows, entries = torch.arange(size[0], device=places.device), torch.arange(size[2], device=places.device)
        visible: Tensor = mask.mask_mod(
            rows[:, None, None].expand(size),
            rows.new_zeros(()).expand(size),
            places[:, :, None].expand(size),
            entries.expand(size),
        )
        return visible.expand(size)[:, None]
