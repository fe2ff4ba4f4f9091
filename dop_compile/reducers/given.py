"""Tokens that the caller names with each call, one sequence of indices per sample."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dop_compile.reducers.base import Selection, VisualContext

__all__ = ["GivenReducer"]


@dataclass(frozen=True, init=False)
class GivenReducer:
    """Keeps the tokens in `indices`, in their order, which is taken as the ranking (best first).

    Unlike the other reducers it is made anew for each call, as its indices belong to the call's samples
    and not to the policy. An index counts the visual tokens of its sample, across all its images.

    Args:
        indices: one sequence of ints, or one integer tensor (kept,), per sample of the batch.

    Raises:
        TypeError: `indices` is not a sequence per sample, or holds something other than integers.
        ValueError: a sample names a token twice, or a negative index.
    """

    indices: tuple[tuple[int, ...], ...]
    name = "given"
    requires = frozenset[str]()
    reads_values = False
    whole_sample = True

    def __init__(self, indices: Sequence[Sequence[int] | Tensor] | Tensor) -> None:
        if isinstance(indices, str) or not isinstance(indices, Sequence | Tensor):
            raise TypeError(f"reducer 'given': indices must be one sequence per sample, not {type(indices).__name__}")
        object.__setattr__(self, "indices", tuple(_row(number, row) for number, row in enumerate(indices)))

    @property
    def counts(self) -> tuple[int, ...]:
        """How many tokens are named for each sample."""
        return tuple(len(row) for row in self.indices)

    def __call__(self, context: VisualContext, count: int) -> Selection:
        """Keep the sample's tokens.

        Raises:
            ValueError: no indices for this sample, another number than `count`, or one out of range.
        """
        sample = context.sample_index
        if not 0 <= sample < len(self.indices):
            raise ValueError(f"reducer 'given': indices for {len(self.indices)} samples, none for sample {sample}")
        row = self.indices[sample]
        if len(row) != count:
            raise ValueError(
                f"reducer 'given': {len(row)} indices for sample {sample}, but {count} of its "
                f"{context.tokens} visual tokens are to be kept; give exactly {count}"
            )
        if row and max(row) >= context.tokens:
            raise ValueError(
                f"reducer 'given': index {max(row)} for sample {sample}, which has only {context.tokens} visual tokens"
            )
        return Selection(torch.tensor(row, dtype=torch.long, device=context.projected.device))


def _row(sample: int, row: Sequence[int] | Tensor) -> tuple[int, ...]:
    where = f"reducer 'given': indices for sample {sample}"
    values = row.tolist() if isinstance(row, Tensor) else row
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{where} must be a sequence of integers, not {row!r}")
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{where} must be integers, not {value!r}")
        if value < 0:
            raise ValueError(f"{where} must not be negative, but one is {value}")
    if len(set(values)) != len(values):
        twice = next(value for value, times in Counter(values).items() if times > 1)
        raise ValueError(f"{where} name token {twice} more than once")
    return tuple(values)
