"""Outer models that build attention masks themselves (Gemma 3, PaliGemma) hand them over unbuilt.

Such a model's forward calls Hugging Face's mask builders on the caller's sequence. After token reduction that mask
would be wrong, for windows count the decoder's slots. So its forward runs, for a compiled model, with mask builders
that only note their arguments; the runtime calls the real ones once the slots are known, with values per token
(`mask_values`) of the slots' tokens.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dop_compile.errors import UnsupportedUsageError
from dop_compile.hf.names import BLOCKS
from dop_compile.hf.private import can_return_tuple
from dop_compile.hf.rebuilt import names_in, with_globals
from dop_compile.hf.spellings import CACHE, EMBEDS, MASK, POSITIONS, canonical, signature, spelled
from dop_compile.runtime.mask_values import MaskValues

__all__ = ["DeferredMask", "DeferredMasks", "builds_masks", "deferred", "deferring_forward", "positions_of_masks"]

_REPLACED = (EMBEDS, MASK, CACHE, POSITIONS)


class DeferredMask:
    """A call of a mask builder, to be made for the decoder's slots.

    `attention_mask` is the caller's padding mask (batch, tokens), `positions` what the builder was given to tell packed
    samples by; None also where it has a cache, with which it does not look for those.
    """

    def __init__(self, builder: Callable[..., Any], kwargs: dict[str, Any]):
        self._builder = builder
        self._kwargs = kwargs
        self._has_cache = kwargs.get(CACHE) is not None
        self.attention_mask: Tensor | None = kwargs.get(MASK)
        self.positions: Tensor | None = None if self._has_cache else kwargs.get(POSITIONS)

    def original(self) -> Any:
        """What the outer model would have built: a mask, or masks by layer type."""
        return self._builder(**spelled(self._builder, self._kwargs))

    def build(
        self,
        embeds: Tensor,
        mask: Tensor | None,
        view: Any,
        positions: Tensor,
        columns: Tensor | None,
        total: int,
    ) -> Any:
        """The same for the slots.

        Args:
            columns: (batch, past and new slots) caller's column of each, -1 for padding; None where column i is slot i.
            total: number of the caller's columns since the conversation began.

        Raises:
            UnsupportedUsageError: an argument of the builder cannot be followed.
        """
        kwargs = self._own_arguments()
        if columns is not None:
            rows = torch.arange(columns.shape[0], device=columns.device)[:, None]
            kwargs = MaskValues(rows, columns.clamp(min=0), (columns.shape[0], total)).follow(kwargs)
        _check_blocks(kwargs.get(BLOCKS), self._kwargs.get("config"), past=0 if view is None else view.get_seq_length())
        # Positions with gaps are no packed sequences: without positions Hugging Face does not look for those. Nor does
        # it with a cache, which a decoder may make after its outer model has built the mask
        has_positions = columns is None and self._kwargs.get(POSITIONS) is not None
        given = {
            EMBEDS: embeds,
            MASK: mask,
            POSITIONS: positions if has_positions else None,
            CACHE: view if self._has_cache else None,
        }
        return self._builder(**spelled(self._builder, {**kwargs, **given}))

    def of_rows(self, rows: Tensor, columns: Tensor, embeds: Tensor, mask: Tensor) -> DeferredMask:
        """The call for other rows; `rows` and `columns` (new rows, tokens) are the places of their tokens."""
        size: tuple[int, int] = tuple(self._kwargs[EMBEDS].shape[:2])
        kwargs = MaskValues(rows, columns, size).follow(self._own_arguments())
        return DeferredMask(self._builder, {**kwargs, EMBEDS: embeds, MASK: mask})

    def _own_arguments(self) -> dict[str, Any]:
        return {name: value for name, value in self._kwargs.items() if name not in _REPLACED}


def _check_blocks(blocks: Tensor | None, config: Any, past: int) -> None:
    """Blocks (batch, slots) are seen through sliding windows, but the original's cache has forgotten what is older."""
    window = getattr(config, "sliding_window", None)
    if blocks is None or not window or past < window or blocks.shape[1] <= past:
        return
    old, new = blocks[:, : past - window + 1, None], blocks[:, None, past:]
    if bool(((old == new) & (new >= 0)).any()):
        raise UnsupportedUsageError(
            "tokens of this turn are of a bidirectional block that began before the sliding window of an earlier turn; "
            "a compiled model keeps what the original has forgotten by then. Pass token_type_ids of the new tokens "
            "alone, or the conversation as one prompt"
        )


class DeferredMasks:
    """Masks by layer type, each of which the outer model asks its builder for."""

    def __init__(self, masks: dict[str, DeferredMask]):
        self._masks = masks
        first = next(iter(masks.values()))
        self.attention_mask, self.positions = first.attention_mask, first.positions

    def original(self) -> dict[str, Any]:
        return {kind: mask.original() for kind, mask in self._masks.items()}

    def build(self, *arguments: Any) -> dict[str, Any]:
        return {kind: mask.build(*arguments) for kind, mask in self._masks.items()}

    def of_rows(self, *arguments: Any) -> DeferredMasks:
        return DeferredMasks({kind: mask.of_rows(*arguments) for kind, mask in self._masks.items()})


def deferred(mask: Any) -> DeferredMask | DeferredMasks | None:
    """The masks that an outer model hands to its decoder, if they are still to be built."""
    if isinstance(mask, dict) and mask and all(isinstance(value, DeferredMask) for value in mask.values()):
        return DeferredMasks(mask)
    return mask if isinstance(mask, DeferredMask) else None


def builds_masks(module: nn.Module) -> bool:
    """Whether the module's forward calls mask builders."""
    return bool(_builders(inspect.unwrap(type(module).forward)))


def _builders(function: Any) -> dict[str, Callable[..., Any]]:
    """The mask builders that a function calls, by name."""
    values = ((name, function.__globals__.get(name)) for name in names_in(function))
    return {
        name: value
        for name, value in values
        if inspect.isfunction(value) and name.startswith("create_") and "mask" in name
    }


def _with_builders(
    module: nn.Module, replace: Callable[[Callable[..., Any], dict[str, Any]], Any]
) -> Callable[..., Any]:
    """The forward of a module's class; each of its mask builders is `replace(builder, arguments by name)`."""
    function: Any = inspect.unwrap(type(module).forward)

    def replaced(builder: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            arguments = dict(signature(builder).bind(*args, **spelled(builder, kwargs)).arguments)
            return replace(builder, canonical(builder, arguments.pop("kwargs", {}) | arguments))

        return call

    namespace = {
        **function.__globals__,
        **{name: replaced(builder) for name, builder in _builders(function).items()},
    }
    return with_globals(function, namespace)


def deferring_forward(module: nn.Module) -> Callable[..., Any]:
    """The module's forward, bound, with mask builders that return a `DeferredMask`."""
    return types.MethodType(can_return_tuple(_with_builders(module, DeferredMask)), module)  # type: ignore[no-untyped-call]


class _Asked(Exception):
    """Stops a forward at its first mask; holds the positions that tell packed samples there."""


def positions_of_masks(decoder: nn.Module, **arguments: Any) -> Tensor | None:
    """The positions (batch, tokens) by which a decoder's own masks tell packed samples; None if they do not look.

    Args:
        arguments: of a call of the decoder without mask and cache.
    """
    if not builds_masks(decoder):
        return None

    def stop(builder: Callable[..., Any], given: dict[str, Any]) -> None:
        if "position_ids" in signature(builder).parameters:
            raise _Asked(given.get("position_ids"))

    try:
        _with_builders(decoder, stop)(decoder, **arguments)
    except _Asked as asked:
        positions: Tensor | None = asked.args[0]
        return positions
    return None
