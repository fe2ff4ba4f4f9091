"""Checks of what a reducer returns. All index tensors of a batch are copied to the CPU at once."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from dop_compile.reducers.base import VisualContext

__all__ = ["check_features", "check_indices", "check_numbers"]


def check_indices(
    what: str,
    values: Sequence[object],
    sizes: Sequence[tuple[int, int]],
    *,
    unique: bool = False,
    at_most: bool = False,
) -> list[Tensor]:
    """The tensors on the CPU.

    Args:
        what: for messages.
        values: one per part; should be (count,) int64 tensors.
        sizes: tokens and count of each part.
        unique: refuse duplicates.
        at_most: fewer than `count` are right, too.

    Raises:
        TypeError, ValueError: they are something else, or out of range.
    """
    tensors = []
    for value, (_, count) in zip(values, sizes, strict=True):
        if not isinstance(value, Tensor):
            raise TypeError(f"{what} must be a tensor, not {type(value).__name__}")
        if value.dtype != torch.long:
            raise ValueError(f"{what} must be int64, not {value.dtype}")
        right = value.ndim == 1 and len(value) <= count if at_most else value.shape == (count,)
        if not right:
            limit = " at most" if at_most else ""
            raise ValueError(f"{what} must have shape ({count},){limit}, as asked for, not {tuple(value.shape)}")
        tensors.append(value)
    if not tensors:
        return []
    joined = torch.split(torch.cat(tensors).cpu(), [len(value) for value in tensors])
    for value, (tokens, _) in zip(joined, sizes, strict=True):
        numbers = value.tolist()
        for token in numbers:
            if not 0 <= token < tokens:
                raise ValueError(f"{what} contain {token}, out of range for {tokens} visual tokens")
        if unique and len(set(numbers)) != len(numbers):
            twice = next(index for index, times in Counter(numbers).items() if times > 1)
            raise ValueError(f"{what} contain {twice} more than once")
    return list(joined)


def check_features(what: str, value: object, context: VisualContext, count: int) -> None:
    """Refuse features that cannot take the place of `count` rows of `context.projected`.

    Raises:
        TypeError, ValueError: no tensor, or one of another shape, dtype or device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} must be a tensor, not {type(value).__name__}")
    expected = (count, context.projected.shape[1])
    if value.shape != expected:
        raise ValueError(f"{what} must have shape {expected}, not {tuple(value.shape)}")
    like = context.projected
    if value.dtype != like.dtype or value.device != like.device:
        raise ValueError(
            f"{what} must be {like.dtype} on {like.device}, as `projected` is, not {value.dtype} on {value.device}"
        )


def check_numbers(what: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Refuse features with NaN of their own: pairs of what a reducer made and what it was given. The host waits once.

    A NaN that was there before the reducer is not its fault, and passes through as in the original.

    Raises:
        ValueError: saying so.
    """
    own = [made.isnan().any() & ~given.isnan().any() for made, given in pairs]
    if own and bool(torch.stack(own).any()):
        raise ValueError(f"{what} contain NaN, though the features it was given do not")
