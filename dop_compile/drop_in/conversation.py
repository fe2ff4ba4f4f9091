"""What Hugging Face's modules hold between the calls of a conversation, and what here its cache holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dop_compile.hf.names import CONVERSATION_ATTRIBUTES

__all__ = ["conversation", "set_conversation"]


def set_conversation(chain: Sequence[Any], known: dict[str, Any]) -> None:
    """Let modules hold what belongs to a conversation, as `conversation` returns it; or nothing."""
    for number, module in enumerate(chain):
        for name in CONVERSATION_ATTRIBUTES:
            if name in vars(module):
                setattr(module, name, known.get(f"{number}.{name}"))


def conversation(chain: Sequence[Any], batch: int) -> dict[str, Any]:
    """What modules hold of a conversation, for so many rows."""

    def per_row(value: Any) -> Any:  # beams repeat the rows after some models computed this for the prompts
        if isinstance(value, Tensor) and value.dim() and batch > value.shape[0] and batch % value.shape[0] == 0:
            return value.repeat_interleave(batch // value.shape[0], dim=0)
        return value

    return {
        f"{number}.{name}": per_row(vars(module)[name])
        for number, module in enumerate(chain)
        for name in CONVERSATION_ATTRIBUTES
        if vars(module).get(name) is not None
    }
