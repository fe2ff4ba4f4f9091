"""Compiled pieces: one function per kind of piece, shared by all layers, tiers and programs of a compiled model."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.exc import Unsupported, UserError
from torch.fx.experimental import _config as fx_config

from dop_compile.checks import choice
from dop_compile.logs import COMPILE
from dop_compile.runtime.direct import noting_inductor

__all__ = ["PieceLibrary", "call_module", "check_backend", "piece_kind"]

# Two token counts that happen to be equal in the first call are not equal in every call
_NO_DUCK_SHAPES = functools.partial(fx_config.patch, use_duck_shape=False)  # type: ignore[attr-defined]


def check_backend(backend: Any) -> None:
    """Raises TypeError or ValueError for a backend that torch.compile would refuse much later, in the first call."""
    if callable(backend) or (isinstance(backend, str) and backend in ("eager", "inductor")):
        return
    if not isinstance(backend, str):
        raise TypeError(f"backend: expected a name or a function, got {backend!r}")
    choice("backend", backend, torch._dynamo.list_backends(exclude_tags=()))


def call_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


class PieceLibrary:
    """Functions shared by all programs of one compiled model, one per kind of piece.

    Args:
        backend: "eager", or any backend of `torch.compile`.
        options: further keyword arguments of `torch.compile`.
    """

    def __init__(self, backend: Any, options: dict[str, Any] | None = None):
        self.backend = backend
        self._is_eager: bool = backend == "eager"
        self._options = options or {}
        self._functions: dict[str, Callable[..., Any]] = {}
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._functions)

    @property
    def guards_strides(self) -> bool:
        """Whether compiled functions are compiled again for other strides of the same sizes."""
        return not self._is_eager and not self.passes_guards

    @property
    def passes_guards(self) -> bool:
        """Whether calls of compiled functions go past their guards (see `direct`)."""
        return self.backend == "inductor" and not self._options.keys() & {"mode", "options"}

    def clear(self) -> None:
        """Forget all functions: modules have changed in ways that compiled code does not look for."""
        self._functions.clear()

    def function(self, kind: str, graph: fx.Graph) -> Callable[..., Any]:
        """The function of a kind."""
        with self._lock:
            if kind not in self._functions:
                plain = fx.GraphModule(nn.Module(), graph, class_name="Piece").forward
                self._functions[kind] = (
                    plain if self.backend == "eager" else self._by_unit_sizes(graph, len(self._functions))
                )
            return self._functions[kind]

    def _by_unit_sizes(self, graph: fx.Graph, number: int) -> Callable[..., Any]:
        """One compiled function for each of "one row or more", "one token or more" and the like, and way of autograd.

        torch.compile always specialises sizes of one. Kept apart, each function compiles once, and nobody comes near
        the limit of recompilations of a function, behind which torch.compile refuses to go on.
        """
        variants: dict[Any, Callable[..., Any]] = {}
        kind_name = f"piece {number} ({_named(graph)})"

        def piece(*args: Any) -> Any:
            kind = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *map(_unit_sizes, args))
            if kind in variants:
                return variants[kind](*args)
            with self._lock, _NO_DUCK_SHAPES():
                if kind not in variants:
                    again = " again, for other sizes of one or another way of autograd" if variants else ""
                    COMPILE.info("%s: %d operations%s", kind_name, len(graph.nodes), again)
                    compiled = self._compile(graph, fullgraph=True)
                    try:
                        result = compiled(*args)
                    except (Unsupported, UserError):
                        if "fullgraph" in self._options:
                            raise
                        COMPILE.info("%s: in parts, since its code branches on values", kind_name)
                        # A module whose code branches on values (experts of ERNIE, of Step) is compiled in parts
                        compiled = self._compile(graph, fullgraph=False)
                        result = compiled(*args)
                    variants[kind] = compiled
                    return result
            return variants[kind](*args)

        return piece

    def _compile(self, graph: fx.Graph, **settings: Any) -> Callable[..., Any]:
        fresh = fx.GraphModule(nn.Module(), graph, class_name="Piece")
        backend = noting_inductor if self.passes_guards else self.backend
        compiled: Callable[..., Any] = torch.compile(
            fresh, backend=backend, **{"dynamic": True, **settings, **self._options}
        )
        return compiled


def _named(graph: fx.Graph) -> str:
    """What a piece is called in logs: its first and its last operation."""
    names = [node.name for node in graph.nodes if node.op not in ("placeholder", "output")]
    return " to ".join(dict.fromkeys([names[0], names[-1]])) if names else "nothing"


def _unit_sizes(value: Any) -> Any:
    """What torch.compile specialises in an argument: sizes of 0 and 1, and what is missing. Weights are fixed."""
    if type(value) is torch.Tensor:
        return tuple([min(size, 2) for size in value.shape])
    return value is None


def piece_kind(graph: fx.Graph, held: dict[str, Any]) -> str:
    """What decides whether two pieces can share a function: their operations and the structure of what they hold.

    Args:
        graph: the piece; its modules and parameters are inputs. Reordered so that inputs come first.
        held: the module or parameter of each such input, by name.
    """
    _placeholders_first(graph)
    described = [f"{name}:{_structure(value)}" for name, value in held.items()]
    return _canonical(graph) + "\n" + "\n".join(described)


def _structure(value: Any) -> str:
    """What decides whether two modules can share a compiled function."""
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)}:{value.dtype}"
    parts = [f"{name}{tuple(p.shape)}{p.dtype}" for name, p in value.named_parameters()]
    kinds = [type(module).__qualname__ for module in value.modules()]
    return f"{','.join(kinds)}|{','.join(parts)}|{value.training}"


def _placeholders_first(graph: fx.Graph) -> None:
    first = next((node for node in graph.nodes if node.op != "placeholder"), None)
    if first is None:
        return
    for node in [node for node in graph.nodes if node.op == "placeholder"]:
        if first < node:
            first.prepend(node)


def _canonical(graph: fx.Graph) -> str:
    """Text of a piece with its nodes numbered, equal for equal pieces."""
    number = {node: f"%{index}" for index, node in enumerate(graph.nodes)}
    lines = []
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: _Name(number[n]))
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__qualname__", node.target)
        lines.append(f"{node.op} {'' if node.op == 'placeholder' else target} {args} {kwargs}")
    return "\n".join(lines)


class _Name(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
