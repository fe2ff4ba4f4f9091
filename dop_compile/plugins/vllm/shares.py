"""How the pictures of one prompt share its visual tokens in vLLM, and what travels with each to the model.

A picture's tokens are encoded and cached by what it shows. How many of them a prompt lets in depends on its other
pictures, so the share is part of what a cached picture is known by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dop_compile.errors import UnsupportedUsageError
from dop_compile.reducers.quotas import quotas

__all__ = ["Layout", "Share", "shares_of"]


@dataclass(frozen=True)
class Layout:
    """A picture's embeddings as vLLM places them.

    Args:
        rows, columns: of a part at the end in which each row is followed by a newline (LLaVA-NeXT); 0 without.
        tokens: embeddings in all, newlines counted.
    """

    tokens: int
    rows: int = 0
    columns: int = 0

    @property
    def newlines(self) -> int:
        return self.rows

    @property
    def is_newline(self) -> Tensor:
        """(tokens,)"""
        found = torch.zeros(self.tokens, dtype=torch.bool)
        if self.rows:
            first = self.tokens - self.rows * (self.columns + 1)
            found[first:].view(self.rows, self.columns + 1)[:, -1] = True
        return found


@dataclass(frozen=True)
class Share:
    """One picture of a prompt.

    Args:
        number: of the picture in its prompt, from 0.
        count: visual tokens that enter, newlines not counted.
        layout: what it has.
    """

    number: int
    count: int
    layout: Layout

    @property
    def kept(self) -> int:
        """Embeddings that enter, newlines counted."""
        return self.count + self.layout.newlines

    @property
    def key(self) -> str:
        """What makes the same picture another one for caches."""
        return f"{self.number}-{self.count}"

    def to_tensor(self) -> Tensor:
        """(5,)"""
        return torch.tensor([self.number, self.count, self.layout.tokens, self.layout.rows, self.layout.columns])

    @classmethod
    def from_tensor(cls, numbers: Tensor) -> Share:
        number, count, tokens, rows, columns = numbers.flatten().tolist()
        return cls(number, count, Layout(tokens, rows, columns))


def shares_of(visual_tokens: int, layouts: Sequence[Layout]) -> list[Share]:
    """Of each picture of a prompt, in proportion to its tokens.

    Raises:
        UnsupportedUsageError: too many pictures: one would have no token.
    """
    counts = quotas(visual_tokens, [layout.tokens - layout.newlines for layout in layouts])
    for number, count in enumerate(counts):
        if count == 0:
            raise UnsupportedUsageError(
                f"the policy lets {visual_tokens} visual tokens in, of which picture {number + 1} of {len(counts)} "
                "would have none; send fewer pictures, or serve a policy with more visual_tokens"
            )
    return [Share(number, *both) for number, both in enumerate(zip(counts, layouts, strict=True))]
