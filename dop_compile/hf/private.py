"""What is imported of transformers below its public face, each for a reason."""

from __future__ import annotations

from typing import Any

from transformers.integrations.sdpa_attention import sdpa_attention_forward  # exported graphs call it themselves
from transformers.masking_utils import AttentionMaskInterface, flex_attention_mask  # masks of gathered tokens
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # a kernel of ours, by a name of its own
from transformers.utils.generic import can_return_tuple  # what a rebuilt forward of a decoder is decorated with
from transformers.utils.output_capturing import maybe_install_capturing_hooks  # once, on the original

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "AttentionMaskInterface",
    "can_return_tuple",
    "flex_attention_mask",
    "maybe_install_capturing_hooks",
    "sdpa_attention_forward",
    "window_order",
]


def window_order(grid: Any, merge: int, window: int, patch: int) -> Any:
    """(tokens,) the order in which a tower with windows works on its tokens, where the tower has no method for it."""
    from transformers.vision_utils import get_vision_window_index  # not there in every release

    return get_vision_window_index(grid, merge, window, patch)[0]
