"""What an outer model hands to its decoder, as far as a graph depends on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dop_compile.hf.names import PACKED_FEATURES

__all__ = ["DecoderInputs"]


@dataclass(frozen=True)
class DecoderInputs:
    """Which optional inputs the outer model hands to its decoder; one graph is traced per combination.

    Args:
        position_rows: leading size of `position_ids` (rows, batch, tokens); None for (batch, tokens).
        masks: keys of the mask dictionary that the outer model builds itself; None if the decoder builds the mask.
        cached: whether keys and values are stored.
        packed: how many tensors of packed per-visual-token features (DeepStack) are handed over.
        packed_name: the decoder's argument for them, a key of `PACKED_FEATURES`.
        packed_keys: their keys where they are handed over as a dictionary; None for a list.
        tokens: name, sizes behind (batch, tokens) and dtype of other tensors with a value per token.
        constants: other keyword arguments, all of them plain Python values.
        first_layer: the layer to begin at; later than 0, the residual stream that enters it is an input too.
    """

    position_rows: int | None = None
    masks: tuple[str, ...] | None = None
    cached: bool = True
    packed: int = 0
    packed_name: str = "deepstack_visual_embeds"
    packed_keys: tuple[Any, ...] | None = None
    tokens: tuple[tuple[str, tuple[int, ...], torch.dtype], ...] = ()
    constants: tuple[tuple[str, Any], ...] = ()
    first_layer: int = 0

    @property
    def token_values(self) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
        """`tokens`, with the mask of the visual tokens that packed features belong to."""
        mask = PACKED_FEATURES[self.packed_name]
        if not self.packed or any(name == mask for name, *_ in self.tokens):
            return self.tokens
        return (*self.tokens, (mask, (), torch.bool))
