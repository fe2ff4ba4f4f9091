"""The operations of a vision tower for pixels of one layout, without its control flow.

A tower whose control flow reads the layout (patch grids, image sizes) is run once, for real. What follows from the
layout alone is computed then and becomes constant; what is made of pixels or weights becomes the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from dop_compile.errors import UnsupportedModelError

__all__ = ["flat"]

aten = torch.ops.aten


def flat(vision: Callable[[Tensor], Tensor], pixels: Tensor) -> nn.Module:
    """A graph module of what `vision` does with pixels of this shape.

    Raises:
        UnsupportedModelError: it decides by the values of pixels what to do.
    """

    def forward(pixels: Tensor) -> Tensor:
        with _LayoutAhead():
            return vision(pixels)

    with sdpa_kernel(SDPBackend.MATH):
        return make_fx(forward, tracing_mode="real")(pixels)


class _LayoutAhead(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operations on the layout ahead of the recording below, which sees those on pixels and weights."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ahead: Any = WeakIdKeyDictionary()  # of each tensor made: whether of the layout alone

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.squeeze.dim and args[0].shape[args[1]] != 1:
            func, args = aten.alias.default, args[:1]  # does nothing, where ONNX's Squeeze fails
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        ahead = all(map(self._is_layout, given))
        if ahead:
            with disable_proxy_modes_tracing():
                result = func(*args, **kwargs)
            ahead = bool(given) or not _is_floating(result)  # pixels may be written to a new floating point tensor
        if not ahead:
            if torch.Tag.data_dependent_output in func.tags:
                raise UnsupportedModelError(
                    f"the vision tower decides by the values of its pixels what to do ({func}), which a graph cannot; "
                    "export to ONNX supports towers that read their layout alone"
                )
            result = func(*args, **kwargs)
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._ahead[value] = ahead
        return result

    def _is_layout(self, value: Tensor) -> bool:
        """Floating point tensors from outside are pixels and weights."""
        found: bool = self._ahead.get(value, not _is_floating(value))
        return found


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
