"""Which row of a vision tower's features stands at each placeholder: told by order, and checked by value.

A feature method's rows are scattered, in order, to the places of one mask of placeholders. Whether that is so is
computed where the tensors are, and read back with all else that the host has to know.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dop_compile.vision.features import TokenFeatures

__all__ = ["placed_rows", "placement_checks"]


def placement_checks(parts: Sequence[TokenFeatures], masks: Sequence[Tensor], embeds: Tensor) -> list[Tensor]:
    """For each part and each mask one bool, on the device: the part's rows stand at the mask's places, one each.

    Args:
        masks: (batch, tokens) bool: placeholders, as the model found them.
        embeds: (batch, tokens, hidden) embeddings with visual features merged in.
    """
    return [_stand_in_order(part.rows, mask, embeds) for part in parts for mask in masks]


def _stand_in_order(rows: Tensor, mask: Tensor, embeds: Tensor) -> Tensor:
    if not len(rows) or rows.shape[1:] != embeds.shape[2:]:
        return torch.zeros((), dtype=torch.bool, device="cpu")
    places = mask.to(embeds.device).flatten()
    numbers = (places.cumsum(0) - 1).clamp(0, len(rows) - 1)
    same = (rows.to(embeds)[numbers] == embeds.flatten(0, 1)).all(dim=-1)
    return (same | ~places).all()


def placed_rows(
    parts: Sequence[TokenFeatures], masks: Sequence[Tensor], seen: Sequence[Tensor], embeds: Tensor
) -> list[Tensor | None]:
    """(batch, tokens) on the CPU per part: the row of it that stands at each placeholder, -1 at other positions.

    None for a part that stands nowhere as it is.

    Args:
        seen: on the CPU, the masks and after them what `placement_checks` said of them.
    """
    known, checks = seen[: len(masks)], iter(seen[len(masks) :])
    found = []
    for part in parts:
        own = [_placed(part, mask, there, bool(next(checks)), embeds) for mask, there in zip(known, masks, strict=True)]
        found.append(next((rows for rows in own if rows is not None), None))
    return found


def _placed(part: TokenFeatures, mask: Tensor, there: Tensor, in_order: bool, embeds: Tensor) -> Tensor | None:
    places = mask.numpy()
    times, more = divmod(int(places.sum()), max(len(part.rows), 1))
    if more or not times or len(places) % times:
        return None
    if times > 1:
        return _repeated(part, mask, there, times, embeds)
    if not in_order:
        return None
    rows = np.full(places.shape, -1)
    rows[places] = np.arange(len(part.rows))
    return torch.from_numpy(rows)


def _repeated(part: TokenFeatures, place: Tensor, there: Tensor, times: int, embeds: Tensor) -> Tensor | None:
    """`generate` encodes images before it repeats the rows of a batch for beams and returned sequences."""
    once = torch.full_like(place[::times], -1, dtype=torch.long)
    if int(place[::times].sum()) != len(part.rows):
        return None
    once[place[::times]] = torch.arange(len(part.rows), device="cpu")
    rows = once.repeat_interleave(times, dim=0)
    if torch.equal(rows >= 0, place) and torch.equal(
        embeds[there.to(embeds.device)], part.rows[rows[place].to(part.rows.device)].to(embeds)
    ):
        return rows
    return None
