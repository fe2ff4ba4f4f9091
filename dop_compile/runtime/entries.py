"""Which slots of a sequence a layer stores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Entries"]


@dataclass(frozen=True)
class Entries:
    """Which slots a layer stores, in storage order.

    Args:
        count: entries per row.
        slots: (batch, count) slot of each entry; None where entry i is slot i.
        valid: (batch, count) bool, False where a row has padding instead; None where all hold a token.
        seen: (batch, count) bool, False where an entry is there for other layers alone; None where none is.
    """

    count: int = 0
    slots: Tensor | None = None
    valid: Tensor | None = None
    seen: Tensor | None = None

    @cached_property
    def visible(self) -> Tensor | None:
        """(batch, count) bool: which entries the layer's own queries may see; None where they may see all."""
        if self.valid is None or self.seen is None:
            return self.seen if self.valid is None else self.valid
        return self.valid & self.seen

    def append(
        self, offset: int, count: int, slots: Tensor | None, valid: Tensor | None, seen: Tensor | None = None
    ) -> Entries:
        """New entries for slots counted from `offset`; `slots` None means all `count` new slots, all of them seen."""
        if slots is None and self.slots is None and self.count == offset:
            return Entries(offset + count)
        batch, device = (slots if slots is not None else self.slots).shape[0], self._device(slots)  # type: ignore[union-attr]

        def grid(values: Tensor | None, start: int, length: int) -> Tensor:
            if values is not None:
                return values
            return torch.arange(start, start + length, device=device).expand(batch, length)

        all_slots = torch.cat(
            [grid(self.slots, 0, self.count), grid(None if slots is None else slots + offset, offset, count)], dim=1
        )

        def flags(old: Tensor | None, new: Tensor | None) -> Tensor | None:
            if old is None and new is None:
                return None
            parts = ((old, self.count), (new, count))
            yes = [p if p is not None else torch.ones(batch, n, dtype=torch.bool, device=device) for p, n in parts]
            return torch.cat(yes, dim=1)

        return Entries(self.count + count, all_slots, flags(self.valid, valid), flags(self.seen, seen))

    def _device(self, slots: Tensor | None) -> torch.device:
        known = slots if slots is not None else self.slots
        assert known is not None
        return known.device

    def rows(self, change: Callable[[Tensor], Tensor]) -> Entries:
        """The same entries for other batch rows."""
        return replace(
            self,
            slots=None if self.slots is None else change(self.slots),
            valid=None if self.valid is None else change(self.valid),
            seen=None if self.seen is None else change(self.seen),
        )
