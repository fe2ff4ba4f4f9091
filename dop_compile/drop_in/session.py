"""What a caller said about one call of a compiled model, or about one `generate`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dop_compile.drop_in.streams import Streams
from dop_compile.hf.copies import own
from dop_compile.policy.policy import Policy

__all__ = ["CALL_ARGUMENTS", "Session", "presented_as"]

CALL_ARGUMENTS = ("tier", "visual_indices", "token_groups")


@dataclass
class Session:
    """One `generate`, or one plain forward call: its tier and what the caller said about its tokens.

    `policy` takes the place of the tier's. `streams` tells calls for the caller's prompt from others. `visual` (batch,
    tokens) are the placeholders of a prompt whose ids the decoder's own head does not get to see.
    """

    tier: str
    visual_indices: Any = None
    token_groups: Any = None
    policy: Policy | None = None
    visual: Tensor | None = None
    streams: Streams = field(default_factory=Streams)

    def inner(self, named: dict[str, Any]) -> Session:
        """The session of a `generate` that is called from this one, with what it says itself in `named`."""
        said = {n: getattr(self, n) if named.get(n) is None else named[n] for n in CALL_ARGUMENTS}
        policy = self.policy if said["tier"] == self.tier else None
        return Session(said["tier"], said["visual_indices"], said["token_groups"], policy)


def presented_as(method: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the name, docstring and signature of a class's method, for code that inspects them."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__signature__ = _bound_signature(method)  # type: ignore[attr-defined]
    return own(call)


@functools.lru_cache(maxsize=256)
def _bound_signature(method: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(method)
    return signature.replace(parameters=list(signature.parameters.values())[1:])
