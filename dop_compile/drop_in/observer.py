"""What may watch a call of a compiled model, or run its decoder otherwise: timing, counting, recording, replaying."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dop_compile.policy.policy import Policy
from dop_compile.runtime.call import Call
from dop_compile.vision.prompt import vision_fields

__all__ = ["Observer"]


class Observer:
    """Sees every forward of one frame; as it is, it changes nothing."""

    def vision_fields(self, policy: Policy) -> frozenset[str] | None:
        """What the policy's reducer wants to know about the vision tower; None if it is not asked."""
        reduces = policy.visual_tokens is not None or policy.salient_fraction is not None
        return vision_fields(policy) if reduces else None

    def decoder(self, decoder: Any, call: Call, arguments: dict[str, Any], run: Callable[[], Any]) -> Any:
        """The decoder's output.

        Args:
            decoder: the frame's own copy.
            call: what the outer model told.
            arguments: of the decoder's forward, by their canonical names.
            run: runs the policy's program.
        """
        return run()

    def returned(self, output: Any) -> None:
        """The model's forward has returned."""
