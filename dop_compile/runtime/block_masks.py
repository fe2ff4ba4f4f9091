"""FlexAttention: the model's own mask function, applied to the slots of a layer's queries and entries.

Hugging Face hands FlexAttention a `BlockMask`, which holds a function of (batch, head, query, key) and the blocks
in which it is true anywhere. A layer with other queries and keys than all slots gets a mask of the same function, of
the slots that its queries and keys came from.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from dop_compile.hf.private import flex_attention_mask
from dop_compile.runtime.entries import Entries

__all__ = ["BlockMask", "gathered_block_mask"]


def gathered_block_mask(
    mask: BlockMask, rows: Tensor, entries: Entries, *, some_keyless: bool
) -> tuple[BlockMask, Tensor | None]:
    """The mask of a layer, and which of its queries see a key (batch, queries).

    Args:
        mask: the model's mask over the call's slots and all slots.
        rows: (batch, queries) slot of each query, counted from the call's first one.
        entries: what the layer stores.
        some_keyless: whether a query may see no key; if not, which do is None.
    """
    batch, queries = rows.shape
    device = rows.device
    slots, valid = entries.slots, entries.visible
    if slots is None:
        slots = torch.arange(entries.count, device=device).expand(batch, -1)
    if valid is None:
        valid = torch.ones(batch, entries.count, dtype=torch.bool, device=device)
    function = _of_slots(mask.mask_mod, rows, slots.contiguous(), valid)
    made = flex_attention_mask(batch, queries, entries.count, mask_function=function, device=device)
    if not some_keyless:
        return made, None
    return made, create_mask(function, batch, None, queries, entries.count, device=str(device)).any(-1)[:, 0]


def _of_slots(function: Callable[..., Tensor], rows: Tensor, slots: Tensor, valid: Tensor) -> Callable[..., Tensor]:
    def of_slots(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return function(batch, head, rows[batch, query], slots[batch, key]) & valid[batch, key]

    return of_slots
