"""Values per token among a mask builder's arguments, against indexing written out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import and_masks, blockwise_overlay, or_masks, sliding_window_overlay

from dop_compile.errors import UnsupportedUsageError
from dop_compile.runtime.mask_values import MaskValues

SIZE = (2, 6)
COLUMNS = torch.tensor([[0, 2, 5], [1, 3, 4]])
IDS = torch.tensor([[0, 0, 1, 1, -1, 2], [3, 3, 3, -1, 4, 4]])
VALUES = MaskValues(torch.arange(2)[:, None], COLUMNS, SIZE)
TAKEN = torch.stack([row[columns] for row, columns in zip(IDS, COLUMNS, strict=True)])


def visible(function: Callable[..., Tensor], length: int) -> Tensor:
    places = torch.arange(length)
    return function(torch.arange(2)[:, None, None], 0, places[:, None], places)


def test_tensors() -> None:
    found = VALUES.follow({"block_sequence_ids": IDS, "one": IDS[:1], "deep": IDS[..., None], "window": 4, "no": None})
    assert torch.equal(found["block_sequence_ids"], TAKEN)
    assert torch.equal(found["one"], IDS[0][COLUMNS])
    assert torch.equal(found["deep"], TAKEN[..., None])
    assert (found["window"], found["no"]) == (4, None)
    short = VALUES.follow({"block_sequence_ids": IDS[:, :4]})["block_sequence_ids"]
    assert torch.equal(short, torch.where(COLUMNS < 4, TAKEN, -1))


def test_mask_functions() -> None:
    """What a function closes over is followed, however deep; windows and the function itself are left."""
    own = lambda ids: lambda b, h, q, k, marks=(ids,): marks[0][b, q] == ids[b, k]  # noqa: E731
    for make in (blockwise_overlay, own, lambda ids: functools.partial(own(ids), marks=[ids])):
        both = lambda ids: or_masks(make(ids), and_masks(sliding_window_overlay(2), make(ids)))  # noqa: E731, B023
        function = both(IDS)
        found = VALUES.follow({"or_mask_function": function})["or_mask_function"]
        assert torch.equal(visible(found, 3), visible(both(TAKEN), 3))
        assert torch.equal(visible(function, 6), visible(both(IDS), 6))
    window = sliding_window_overlay(2)
    assert VALUES.follow({"and_mask_function": window})["and_mask_function"] is window


class _Marks:
    def __init__(self) -> None:
        self.ids = IDS

    def mask(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.ids[b, q] == self.ids[b, k]


@pytest.mark.parametrize(
    "value", [torch.tensor([3, 4]), IDS[:, :4], torch.zeros(3, 6), blockwise_overlay(IDS[:, :5]), _Marks().mask]
)
def test_what_cannot_be_followed_is_refused(value: Any) -> None:
    with pytest.raises(UnsupportedUsageError, match="and_mask_function, which holds a"):
        VALUES.follow({"and_mask_function": value})
