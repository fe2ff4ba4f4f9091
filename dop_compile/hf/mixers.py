"""Token mixers besides attention: modules that keep a convolution or a recurrent state in the cache.

Recognised by what their forward does with the cache, never by a name. A mixer is one node of the graph and runs as it
is, with its own kernels. It is given the tokens of its layer's sequence, right-aligned per row, and the padding mask of
that grid: exactly as if the other tokens were not in its sequence. A mask over all tokens would not do, because states
decay and windows slide over what is masked between two tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from dop_compile.hf.names import CHANNEL_MIXERS, MIXED_BY, STATE_UPDATES
from dop_compile.hf.rebuilt import names_in
from dop_compile.hf.spellings import MASK

__all__ = ["ignores_padding", "is_mixer", "mixes_no_tokens", "with_padding_mask"]


def _arguments(module: nn.Module) -> list[str]:
    return list(inspect.signature(inspect.unwrap(type(module).forward)).parameters)


def is_mixer(module: nn.Module) -> bool:
    """Whether a module mixes tokens by a state that it keeps in the cache, and takes a (batch, tokens) padding mask.

    Convolutions inside an attention are none: they call theirs otherwise (`conv_mask`).
    """
    return bool(STATE_UPDATES & names_in(type(module).forward)) and MASK in _arguments(module)


def mixes_no_tokens(layer: nn.Module) -> bool:
    """Whether a layer is made of norms and MLPs alone, by their names, and none of their parts is given a cache, a mask
    or positions (the MLP layers of Nemotron-H)."""
    children = dict(layer.named_children())
    names = (f"{name} {type(child).__name__}".lower() for name, child in children.items())
    if not all(any(word in name for word in CHANNEL_MIXERS) for name in names):
        return False
    parts = (module for child in children.values() for module in child.modules())
    return not any(name in MIXED_BY for module in parts for name in _arguments(module))


def ignores_padding(module: nn.Module, hidden_size: int) -> bool:
    """Whether a padding mask leaves no trace of what it hides.

    Mixers multiply what they are given by it. A projection with a bias makes something of these zeros, which windows
    and states then take in (transformers' own batches with padding on the left are inexact there too).
    """
    projections = (m for m in module.modules() if isinstance(m, nn.Linear) and m.in_features == hidden_size)
    return all(projection.bias is None for projection in projections)


def with_padding_mask(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], mask: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a mixer's call, with another padding mask."""
    place = _arguments(module).index(MASK) - 1  # `self` is not among the arguments
    if place < len(args):
        return (*args[:place], mask, *args[place + 1 :]), dict(kwargs)
    return args, {**kwargs, MASK: mask}
