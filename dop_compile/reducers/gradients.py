"""Gradients of merged tokens: reducers choose without, and what they make of tokens carries them.

Choosing is constant wherever it has a derivative, so a reducer is asked with detached tensors. Only where it returns
features of its own, and gradients are recorded, is it asked once more with tensors that carry them.

(refused, in the backward pass) gradients through what was computed without: an error is raised when one arrives, since
a gradient of zero would be a wrong one.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from dop_compile.errors import UnsupportedUsageError
from dop_compile.reducers.base import VisualContext

__all__ = ["carries_gradients", "detached", "refusing_gradients"]


def _tensors(context: VisualContext) -> dict[str, Tensor]:
    values = {field.name: getattr(context, field.name) for field in fields(context)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def detached(context: VisualContext) -> VisualContext:
    """The same tensors, without the operations that made them; where there are none, the same context."""
    changed: dict[str, Any] = {n: value.detach() for n, value in _tensors(context).items() if value.requires_grad}
    return replace(context, **changed) if changed else context


def carries_gradients(context: VisualContext) -> bool:
    """Whether gradients are recorded and reach any tensor of the context."""
    return torch.is_grad_enabled() and any(value.requires_grad for value in _tensors(context).values())


def refusing_gradients(values: Tensor, reason: str) -> Tensor:
    """The same values; a gradient that arrives at them raises `UnsupportedUsageError` with the reason."""
    refused: Tensor = _Refused.apply(values.detach(), torch.zeros((), requires_grad=True), reason)  # type: ignore[no-untyped-call]
    return refused


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, _: Tensor, reason: str) -> Tensor:
        ctx.reason = reason
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise UnsupportedUsageError(ctx.reason)
