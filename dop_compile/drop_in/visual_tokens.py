"""Which tokens of a call are visual, where the caller says it or ids tell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dop_compile.drop_in.streams import Stream
from dop_compile.errors import UnsupportedUsageError
from dop_compile.hf.model_path import placeholder_ids

__all__ = ["has_images", "placeholders_by_id", "token_groups"]


def token_groups(groups: Any, input_ids: Tensor | None, tokens: Tensor, past: int, stream: Stream) -> Tensor | None:
    """The caller's groups of a prompt (batch, tokens): 0 text, 1 visual, 2 system; None if nothing is said.

    Args:
        groups: a tensor for the prompt or for the whole conversation, or a function of `input_ids`.
        input_ids, tokens: (batch, tokens) and (batch, tokens, ...) of the call.
        past: tokens before them.

    Raises:
        ValueError: other sizes or values.
        UnsupportedUsageError: a function, without `input_ids`.
    """
    if callable(groups):
        if input_ids is None:
            raise UnsupportedUsageError("a token_groups function needs input_ids; pass a tensor with inputs_embeds")
        groups = groups(input_ids)
    if groups is None:
        return None
    given = torch.as_tensor(groups, device=tokens.device)
    batch, length = tokens.shape[:2]
    if given.dim() != 2:
        raise ValueError(f"token_groups must be (batch, tokens), got {tuple(given.shape)}")
    if given.shape[1] in (past + length, stream.prompt_columns):
        given = given[:, past : past + length]
    if given.shape[0] != batch and batch % given.shape[0] == 0:
        given = given.repeat_interleave(batch // given.shape[0], dim=0)
    if given.shape != (batch, length):
        raise ValueError(f"token_groups is {tuple(given.shape)}; the prompt is {(batch, length)}")
    if not bool(((given >= 0) & (given <= 2)).all()):
        raise ValueError("token_groups: values are 0 (text), 1 (visual) and 2 (system)")
    return given


def placeholders_by_id(root: Any, named: dict[str, Any]) -> list[Tensor]:
    """Placeholder positions by their ids, where images or videos are handed in."""
    if not has_images(named):
        return []
    if named.get("input_ids") is None:
        raise UnsupportedUsageError(
            f"{type(root).__name__} cannot tell which positions of inputs_embeds are visual; pass input_ids, "
            "or token_groups"
        )
    return [named["input_ids"] == number for number in placeholder_ids(root.config)]


def has_images(named: dict[str, Any]) -> bool:
    """Whether a call is given images or videos: pixels, or what a vision tower made of them."""
    encoded = named.get("mm_encoder_outputs") or {}
    pixels = (value for name, value in named.items() if "pixel_values" in name)
    return any(value is not None for value in (*pixels, *encoded.values()))
