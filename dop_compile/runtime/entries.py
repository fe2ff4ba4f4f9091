"""Which slots of a sequence a layer stores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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
    """

    count: int = 0
    slots: Tensor | None = None
    valid: Tensor | None = None

    def append(self, offset: int, count: int, slots: Tensor | None, valid: Tensor | None) -> Entries:
        """New entries for slots counted from `offset`; `slots` None means all `count` new slots."""
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
        all_valid = None
        if valid is not None or self.valid is not None:
            old = torch.ones(batch, self.count, dtype=torch.bool, device=device) if self.valid is None else self.valid
            new = torch.ones(batch, count, dtype=torch.bool, device=device) if valid is None else valid
            all_valid = torch.cat([old, new], dim=1)
        return Entries(self.count + count, all_slots, all_valid)

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
        )
