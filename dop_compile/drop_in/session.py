"""What a caller said about one call of a compiled model, or about one `generate`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dop_compile.policy import Policy

__all__ = ["CALL_ARGUMENTS", "Session", "presented_as"]

CALL_ARGUMENTS = ("tier", "visual_indices", "token_groups")


@dataclass
class Session:
    """One `generate`, or one plain forward call: its tier and what the caller said about its tokens.

    `policy` takes the place of the tier's. `prompt_columns` is where the prompt ends in a `generate`: what stands in
    later columns was generated. `visual` (batch, tokens) are the placeholders of a prompt whose ids the decoder's own
    head does not get to see.
    """

    tier: str
    visual_indices: Any = None
    token_groups: Any = None
    prompt_columns: int | None = None
    policy: Policy | None = None
    visual: Tensor | None = None


def presented_as(method: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the name, docstring and signature of a class's method, for code that inspects them."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    signature = inspect.signature(method)
    call.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])  # type: ignore[attr-defined]
    return call
