"""Outer models that build attention masks themselves (Gemma 3, PaliGemma) hand them over unbuilt.

Such a model's forward calls Hugging Face's mask builders on the caller's sequence. After token reduction that mask
would be wrong, for windows count the decoder's slots. So its forward runs, for a compiled model, with mask builders
that only note their arguments; the runtime calls the real ones once the slots are known.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.utils.generic import can_return_tuple

from dop_compile.spellings import CACHE, EMBEDS, MASK, POSITIONS, canonical, spelled

__all__ = ["DeferredMask", "DeferredMasks", "builds_masks", "deferred", "deferring_forward"]


class DeferredMask:
    """A call of a mask builder, to be made for the decoder's slots.

    `attention_mask` is the caller's padding mask (batch, tokens).
    """

    def __init__(self, builder: Callable[..., Any], kwargs: dict[str, Any]):
        self._builder = builder
        self._kwargs = kwargs
        self.attention_mask: Tensor | None = kwargs.get("attention_mask")

    def original(self) -> Any:
        """What the outer model would have built: a mask, or masks by layer type."""
        return self._builder(**spelled(self._builder, self._kwargs))

    def build(self, embeds: Tensor, mask: Tensor | None, view: Any, positions: Tensor, columns: Tensor | None) -> Any:
        """The same for the slots; `columns` (batch, slots) tells which caller's tokens they are."""
        tokens = self._kwargs["inputs_embeds"].shape[1]
        kwargs = {
            name: _follow(value, tokens, columns) for name, value in self._kwargs.items() if name not in _REPLACED
        }
        # Positions with gaps are no packed sequences: without positions Hugging Face does not look for those
        positions_arg = positions if columns is None and self._kwargs.get("position_ids") is not None else None
        given = {EMBEDS: embeds, MASK: mask, CACHE: view, POSITIONS: positions_arg}
        return self._builder(**spelled(self._builder, {**kwargs, **given}))


class DeferredMasks:
    """Masks by layer type, each of which the outer model asks its builder for."""

    def __init__(self, masks: dict[str, DeferredMask]):
        self._masks = masks
        self.attention_mask = next(iter(masks.values())).attention_mask

    def original(self) -> dict[str, Any]:
        return {kind: mask.original() for kind, mask in self._masks.items()}

    def build(self, *arguments: Any) -> dict[str, Any]:
        return {kind: mask.build(*arguments) for kind, mask in self._masks.items()}


def deferred(mask: Any) -> DeferredMask | DeferredMasks | None:
    """The masks that an outer model hands to its decoder, if they are still to be built."""
    if isinstance(mask, dict) and mask and all(isinstance(value, DeferredMask) for value in mask.values()):
        return DeferredMasks(mask)
    return mask if isinstance(mask, DeferredMask) else None


_REPLACED = (EMBEDS, MASK, CACHE, POSITIONS)


def _follow(value: Any, tokens: int, columns: Tensor | None) -> Any:
    if columns is None or not isinstance(value, Tensor) or value.dim() != 2 or value.shape[1] != tokens:
        return value
    return value.expand(columns.shape[0], -1).gather(1, columns)


def builds_masks(module: nn.Module) -> bool:
    """Whether the module's forward calls mask builders."""
    names = set(inspect.unwrap(type(module).forward).__code__.co_names)
    namespace = inspect.unwrap(type(module).forward).__globals__
    return any(_is_builder(name, namespace.get(name)) for name in names)


def _is_builder(name: str, value: Any) -> bool:
    return inspect.isfunction(value) and name.startswith("create_") and "mask" in name


def deferring_forward(module: nn.Module) -> Callable[..., Any]:
    """The module's forward, bound, with mask builders that return a `DeferredMask`."""
    function = inspect.unwrap(type(module).forward)
    namespace = dict(function.__globals__)

    def defer(builder: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(builder)

        def note(*args: Any, **kwargs: Any) -> DeferredMask:
            named = signature.bind(*args, **spelled(builder, kwargs)).arguments
            return DeferredMask(builder, canonical(builder, named))

        return note

    for name in function.__code__.co_names:
        if _is_builder(name, namespace.get(name)):
            namespace[name] = defer(namespace[name])
    copy = types.FunctionType(
        function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return types.MethodType(can_return_tuple(copy), module)  # type: ignore[no-untyped-call]
