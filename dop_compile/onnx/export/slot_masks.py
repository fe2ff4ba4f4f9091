"""Attention masks over slots: the model's own mask function, applied to the slots of any queries and entries.

A decoder calls Hugging Face's mask builders, which compose a function of (batch, head, query, key) and hand it to the
*mask interface* of the attention implementation. Here that interface returns the function itself, and it is applied
to slot numbers: causal, sliding and chunked masks are then right for entries in any order.

Refused: masks that the outer model builds, or that need more than slots (bidirectional images, packed sequences).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dop_compile.errors import UnsupportedModelError
from dop_compile.hf.private import AttentionMaskInterface
from dop_compile.hf.spellings import CACHE, MASK, POSITIONS, canonical, spelled

__all__ = ["SlotMask", "build_mask", "visible"]

INTERFACE = "dop_compile_slots"
_DROPPED = (MASK, CACHE, POSITIONS)


@dataclass(frozen=True)
class SlotMask:
    """A mask that is not built yet: a function of (batch, head, query slot, key slot)."""

    function: Callable[..., Tensor]


def _interface(*_: Any, mask_function: Callable[..., Tensor], **__: Any) -> SlotMask:
    return SlotMask(mask_function)


AttentionMaskInterface.register(INTERFACE, _interface)


class _SlotConfig:
    """A configuration that names the slot interface and is otherwise the model's own."""

    def __init__(self, config: Any):
        self._config = config
        self._attn_implementation = INTERFACE

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def build_mask(builder: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a mask builder as the decoder does, for slots.

    Raises:
        UnsupportedModelError: the builder adds to the model's mask what slots do not tell.
    """
    given = spelled(builder, kwargs)
    arguments = canonical(builder, inspect.signature(builder).bind(*args, **given).arguments)
    for name in ("or_mask_function", "and_mask_function", "block_sequence_ids"):
        if arguments.get(name) is not None:
            raise UnsupportedModelError(
                f"{getattr(builder, '__name__', builder)} is called with {name}: this attention mask depends on more "
                "than the order of tokens, and export to ONNX does not support it"
            )
    arguments["config"] = _SlotConfig(arguments["config"])
    arguments |= {name: None for name in _DROPPED if name in arguments}
    return builder(**spelled(builder, arguments))


def visible(mask: Any, queries: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """Which entries each query sees; queries (batch, q) and entries (batch, k) are slots, -1 for padding.

    Returns:
        (batch, 1, q, k) bool, all True for a query that sees nothing, so that no softmax is over nothing; and
        (batch, q) bool, whether a query sees anything.
    """
    if not isinstance(mask, SlotMask):
        raise UnsupportedModelError(
            f"the decoder's attention mask is a {type(mask).__name__}, which export to ONNX does not support; expected "
            "one that transformers' mask builders make"
        )
    batch = torch.arange(queries.shape[0], device=queries.device)[:, None, None, None]
    head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=queries.device)
    seen = mask.function(batch, head, queries[:, None, :, None], entries[:, None, None, :])
    seen = seen & (entries >= 0)[:, None, None, :]
    anything = seen.any(dim=-1, keepdim=True)
    return seen | ~anything, anything[:, 0, :, 0]
