"""Stand-ins for tensors while a decoder is traced: fx proxies that know what they stand for.

Each node carries an example value (``meta["val"]``, a fake tensor), so that Python control flow over ranks, dtypes
and static sizes resolves while tracing. The batch and token sizes of the examples are large primes: any size that
they divide is known to be dynamic, and control flow over such a size is refused instead of being frozen.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx

from dop_compile import ops
from dop_compile.errors import UnsupportedModelError

__all__ = [
    "BATCH",
    "OPAQUE",
    "PACKED",
    "TOKENS",
    "Refused",
    "ValueProxy",
    "flatten",
    "is_dynamic",
    "is_packed",
    "map_nested",
]

BATCH = 100_003
TOKENS = 1_000_003
PACKED = 10_000_019
"""Example sizes of the batch, token and packed-visual-token dimensions: primes that no model dimension contains."""


class Refused(UnsupportedModelError):
    """What a forward asks of a proxy is only known at run time."""


class _Opaque:
    def __repr__(self) -> str:
        return "opaque"


OPAQUE = _Opaque()
"""Example value of something that is not a tensor (a cache, a mask that may be None)."""


def is_dynamic(size: Any) -> bool:
    """Whether a size is a multiple of an example size, and so differs from call to call."""
    return isinstance(size, int) and size > 1 and any(size % prime == 0 for prime in (BATCH, TOKENS, PACKED))


def is_packed(value: Any) -> bool:
    """Whether a value holds packed tokens, whose number depends on data."""
    return isinstance(value, Tensor) and any(size % PACKED == 0 and size for size in value.shape)


def map_nested(value: Any, function: Callable[[Any], Any]) -> Any:
    """`function` of every leaf of nested containers and slices."""
    if isinstance(value, tuple | list):
        return type(value)(map_nested(item, function) for item in value)
    if isinstance(value, dict):
        return {key: map_nested(item, function) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(map_nested(part, function) for part in (value.start, value.stop, value.step)))
    return function(value)


def flatten(value: Any) -> Iterator[Any]:
    """Every leaf of nested containers and slices."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from flatten(item)
    elif isinstance(value, dict):
        yield from flatten(list(value.values()))
    elif isinstance(value, slice):
        yield from flatten([value.start, value.stop, value.step])
    else:
        yield value


class ValueProxy(fx.Proxy):
    """An fx proxy that knows the rank, dtype and static sizes of what it stands for."""

    view_of: tuple[ValueProxy, Any] | None = None
    """What this is a part of, and the index."""

    @property
    def value(self) -> Any:
        return self.node.meta.get("val", OPAQUE)

    def size(self, dim: int | None = None) -> Any:
        shape = self.shape
        return shape if dim is None else shape[dim]

    @property
    def shape(self) -> Any:
        value = self.value
        if not isinstance(value, Tensor):
            return ValueAttribute(self, "shape")
        return tuple(
            self.tracer.create_proxy("call_method", "size", (self, dim), {}) if is_dynamic(size) else int(size)
            for dim, size in enumerate(value.shape)
        )

    @property
    def ndim(self) -> int:
        """Of a value that may be missing, `meta["dims"]` says how many dimensions it has otherwise."""
        return int(self.node.meta["dims"] if self.value is OPAQUE else self.value.dim())

    def dim(self) -> int:
        return self.ndim

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    @property
    def device(self) -> Any:
        return self.value.device

    def __len__(self) -> int:
        value = self.value
        if isinstance(value, tuple | list):
            return len(value)
        raise Refused(f"the length of {self.node} is needed while tracing and is not known")

    def __iter__(self) -> Iterator[Any]:
        value = self.value
        if isinstance(value, tuple | list):
            length = len(value)
        elif isinstance(value, Tensor) and not is_dynamic(value.shape[0]):
            length = value.shape[0]
        else:
            raise Refused(f"iterates over {self.node}, whose length is only known at run time")
        return iter([self[index] for index in range(length)])

    def __bool__(self) -> bool:
        value = self.value
        if isinstance(value, bool) and not self.node.meta.get("dynamic"):
            return value
        raise Refused(f"control flow depends on {self.node}, which is only known at run time")

    def __getitem__(self, index: Any) -> Any:
        part: Any = self.tracer.create_proxy("call_function", operator.getitem, (self, index), {})
        part.view_of = (self, index)
        return part

    def __setitem__(self, index: Any, new: Any) -> None:
        # The Python variable goes on to mean the changed tensor, as it does for the caller
        self.node = self.tracer.create_proxy("call_function", ops.masked_assign, (self, index, new), {}).node

    def __getattr__(self, name: str) -> Any:
        return ValueAttribute(self, name)

    def __hash__(self) -> int:
        return id(self)


class ValueAttribute(fx.proxy.Attribute, ValueProxy):
    """An attribute of what a proxy stands for: a method if it is called, else a value."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = self.attr
        if name == "copy_" and self.root.view_of is not None:
            whole, index = self.root.view_of
            whole[index] = args[0]
            return self.root
        if name.endswith("_") and not name.endswith("__"):
            raise Refused(f"{name} changes {self.root.node} in place; only assignment to a part of it can be followed")
        return self.tracer.create_proxy("call_method", name, (self.root, *args), kwargs)

    def __hash__(self) -> int:
        return id(self)
