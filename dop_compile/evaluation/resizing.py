"""Smaller pictures as a method: the same questions, asked of inputs with fewer visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

from dop_compile.search.samples import Samples

__all__ = ["Resized"]

Counts = Sequence[tuple[int, int, int]]


class Resized(Sequence[dict[str, Any]]):
    """Samples whose pictures have at most so many visual tokens, all pictures of a sample together.

    Args:
        samples: the questions; each is processed when it is asked for.
        visual_tokens: of a sample, at most.
    """

    def __init__(self, samples: Samples, visual_tokens: int):
        self._samples, self._most = samples, visual_tokens

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, number: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, number: slice) -> Resized: ...

    def __getitem__(self, number: int | slice) -> dict[str, Any] | Resized:
        if isinstance(number, slice):
            return Resized(self._samples[number], self._most)
        return self._samples.resized(number, self._most)

    def counts(self, lengths: Sequence[int], counts: Counts) -> tuple[tuple[int, int, int], ...]:
        """System, visual and text tokens of every sample: only placeholders have become fewer.

        Args:
            lengths: tokens of the samples' prompts as they were.
            counts: system, visual and text tokens of those.
        """
        own = (self[number]["input_ids"].shape[1] for number in range(len(self)))
        return tuple(
            (system, visual - before + now, text)
            for (system, visual, text), before, now in zip(counts, lengths, own, strict=True)
        )
