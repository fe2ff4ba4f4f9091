"""Lower a pruned graph to steps: compiled pieces with attention and cache between them.

Attention kernels, masks and the cache run as Hugging Face runs them. What lies between two of them is one *piece*: a
pure function of tensors and modules. Pieces of the same kind - the same operations on modules of the same structure,
whatever the layer or the tier - share one function, so that a decoder compiles once per kind of block and the time to
compile does not grow with its depth.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.experimental._config
from torch import fx, nn

from dop_compile import ops
from dop_compile.passes.graph import DecoderGraph, IndexSpec
from dop_compile.tokens import TokenSet
from dop_compile.trace import MASK_BUILDERS, is_packed

__all__ = ["PieceLibrary", "Program"]

# Two token counts that happen to be equal in the first call are not equal in every call
_NO_DUCK_SHAPES = functools.partial(torch.fx.experimental._config.patch, use_duck_shape=False)

_RUNTIME_TARGETS = {ops.update_cache, ops.select_attention_mask, ops.zero_keyless}


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
        self._options = options or {}
        self._functions: dict[str, Callable[..., Any]] = {}
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._functions)

    def clear(self) -> None:
        """Forget all functions: modules have changed in ways that compiled code does not look for."""
        self._functions.clear()

    def function(self, kind: str, graph: fx.Graph, probe: int) -> Callable[..., Any]:
        """The function of a kind; `probe` is the position of an argument whose sizes tell its calls apart."""
        with self._lock:
            if kind not in self._functions:
                plain = fx.GraphModule(nn.Module(), graph, class_name="Piece").forward
                self._functions[kind] = plain if self.backend == "eager" else self._by_unit_sizes(graph, probe)
            return self._functions[kind]

    def _by_unit_sizes(self, graph: fx.Graph, probe: int) -> Callable[..., Any]:
        """One compiled function for each of "one row or more" and "one token or more".

        torch.compile always specialises sizes of one. Kept apart, each function compiles once, and nobody comes near
        the limit of recompilations of a function, behind which torch.compile refuses to go on.
        """
        variants: dict[tuple[bool, ...], Callable[..., Any]] = {}
        settings = {"dynamic": True, "fullgraph": True, **self._options}

        def piece(*args: Any) -> Any:
            sizes = tuple(size == 1 for size in args[probe].shape[:2])
            if sizes in variants:
                return variants[sizes](*args)
            with self._lock, _NO_DUCK_SHAPES():
                if sizes not in variants:
                    fresh = fx.GraphModule(nn.Module(), graph, class_name="Piece")
                    compiled = torch.compile(fresh, backend=self.backend, **settings)
                    result = compiled(*args)
                    variants[sizes] = compiled
                    return result
            return variants[sizes](*args)

        return piece


@dataclass
class _Step:
    """One call: registers to read, registers to write, registers that nobody reads after it."""

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    outputs: tuple[int, ...]
    release: tuple[int, ...] = ()
    is_piece: bool = False
    feeds_piece: bool = False


@dataclass(frozen=True)
class _Register:
    number: int


class Program:
    """A runnable decoder for one keep table, one kind of request and one set of inputs."""

    def __init__(self, graph: DecoderGraph, library: PieceLibrary):
        self.universe = graph.universe
        self.blocks = tuple(graph.blocks)
        self.reports = tuple(graph.reports)
        self.output_tokens = graph.output_tokens
        self.output_class = graph.traced.output_class
        self.layer_keys: dict[int, TokenSet] = {
            block.layer: block.keys for block in self.blocks if block.update is not None
        }
        self._library = library
        self._registers: dict[fx.Node, int] = {}
        self.inputs: dict[str, int] = {}
        self.indices: dict[IndexSpec, int] = {}
        self._steps: list[_Step] = []
        self.pieces: list[str] = []
        self._lower(graph)

    # --- lowering -------------------------------------------------------------------------------------------------

    def _register(self, node: fx.Node) -> int:
        return self._registers.setdefault(node, len(self._registers))

    def _lower(self, graph: DecoderGraph) -> None:
        self._root = graph.traced.root
        piece: list[fx.Node] = []
        waiting: list[fx.Node] = []
        waiting_set: set[fx.Node] = set()
        modules: dict[fx.Node, nn.Module] = {}
        output = graph.output
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                if not node.users:
                    continue
                number = self._register(node)
                if "index" in node.meta:
                    self.indices[node.meta["index"]] = number
                else:
                    self.inputs[node.name] = number
            elif node.op == "get_attr" and isinstance(value := _attribute(self._root, str(node.target)), nn.Module):
                modules[node] = value
            elif node.op == "output":
                continue
            elif self._is_runtime(node):
                # Held back as long as possible, so that the pieces around it grow
                waiting.append(node)
                waiting_set.add(node)
            else:
                if any(source in waiting_set for source in node.all_input_nodes):
                    self._flush(piece, waiting, modules)
                    waiting_set.clear()
                piece.append(node)
        self._flush(piece, waiting, modules)
        (result,) = output.args
        assert isinstance(result, fx.Node)
        self._output = self._register(result)
        self._plan_release()
        del self._registers

    def _is_runtime(self, node: fx.Node) -> bool:
        # Packed tokens have data-dependent shapes: left to run as they are
        if is_packed(node.meta.get("val")) or any(is_packed(n.meta.get("val")) for n in node.all_input_nodes):
            return True
        if node.op != "call_function":
            return False
        if node.target in _RUNTIME_TARGETS or node.target in MASK_BUILDERS or node.meta.get("attention"):
            return True
        return node.target is operator.getitem and isinstance(node.args[0], fx.Node) and self._is_runtime(node.args[0])

    def _flush(self, piece: list[fx.Node], waiting: list[fx.Node], modules: dict[fx.Node, nn.Module]) -> None:
        if piece:
            self._add_piece(piece)
        for node in waiting:

            def refer(n: fx.Node) -> Any:
                return modules[n] if n in modules else _Register(self._register(n))

            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), refer)
            step = _Step(_callable(node, self._root), args, kwargs, (self._register(node),))
            step.feeds_piece = any(not self._is_runtime(user) for user in node.users)
            self._steps.append(step)
        piece.clear()
        waiting.clear()

    def _add_piece(self, nodes: list[fx.Node]) -> None:
        inside = set(nodes)
        results = [node for node in nodes if any(user not in inside for user in node.users)]
        graph = fx.Graph()
        new: dict[fx.Node, fx.Node] = {}
        slots: list[Any] = []
        described: list[str] = []
        for node in nodes:
            for source in node.all_input_nodes:
                if source not in inside and source not in new:
                    new[source] = graph.placeholder(f"x{len(slots)}")
                    slots.append(_Register(self._register(source)))
            if node.op in ("call_module", "get_attr"):
                value = _attribute(self._root, str(node.target))
                holder = graph.placeholder(f"x{len(slots)}")
                slots.append(value)
                described.append(f"{holder.name}:{_structure(value)}")
                if node.op == "get_attr":
                    new[node] = holder
                    continue
                args = (holder, *fx.map_arg(node.args, new.__getitem__))
                kwargs = fx.map_arg(dict(node.kwargs), new.__getitem__)
                new[node] = graph.call_function(call_module, args, kwargs)
            else:
                new[node] = graph.node_copy(node, new.__getitem__)
        graph.output(tuple(new[node] for node in results))
        _placeholders_first(graph)
        kind = _canonical(graph) + "\n" + "\n".join(described)
        self.pieces.append(kind)
        probe = next((number for number, slot in enumerate(slots) if isinstance(slot, _Register)), 0)
        function = self._library.function(kind, graph, probe)
        outputs = tuple(self._register(node) for node in results)
        self._steps.append(_Step(function, tuple(slots), {}, outputs, is_piece=True))

    def _plan_release(self) -> None:
        """Free every intermediate after its last use, as Python locals of the original forward would be."""
        last: dict[int, int] = {}
        for number, step in enumerate(self._steps):
            for register in (*_read_registers((step.args, step.kwargs)), *step.outputs):
                last[register] = number
        for register, number in last.items():
            if register != self._output:
                self._steps[number].release += (register,)

    # --- running --------------------------------------------------------------------------------------------------

    def __call__(self, inputs: dict[str, Any], index: Callable[[IndexSpec], Any]) -> Any:
        """Run the decoder.

        Args:
            inputs: graph inputs by name (see `TracedDecoder`), plus `masks` and `cache_view`.
            index: computes an index tensor of the batch.

        Returns:
            last hidden states of the requested rows (batch, requested, hidden).
        """
        registers: dict[int, Any] = {number: inputs[name] for name, number in self.inputs.items()}
        for spec, number in self.indices.items():
            registers[number] = index(spec)

        def read(a: Any) -> Any:
            return registers[a.number] if isinstance(a, _Register) else a

        for step in self._steps:
            if step.is_piece:
                values = step.function(*[read(a) for a in step.args])
                for number, value in zip(step.outputs, values, strict=True):
                    registers[number] = value
                del values
            else:
                args, kwargs = fx.node.map_aggregate((step.args, step.kwargs), read)
                result = step.function(*args, **kwargs)
                registers[step.outputs[0]] = _canonical_strides(result) if step.feeds_piece else result
                del args, kwargs, result
            for number in step.release:
                del registers[number]
        return registers[self._output]


def _read_registers(arguments: Any) -> list[int]:
    found: list[int] = []

    def note(a: Any) -> Any:
        if isinstance(a, _Register):
            found.append(a.number)
        return a

    fx.node.map_aggregate(arguments, note)
    return found


def _canonical_strides(value: Any) -> Any:
    """The same tensor with the strides of its shape: kernels leave odd ones on sizes of one, which are guarded on."""
    if not isinstance(value, torch.Tensor) or not value.is_contiguous():
        return value
    strides: list[int] = []
    step = 1
    for size in reversed(value.shape):
        strides.append(step)
        step *= max(size, 1)
    wanted = tuple(reversed(strides))
    return value if value.stride() == wanted else value.as_strided(value.shape, wanted)


def _callable(node: fx.Node, root: nn.Module) -> Callable[..., Any]:
    if node.op == "call_method":
        name = str(node.target)
        return lambda value, *args, **kwargs: getattr(value, name)(*args, **kwargs)
    if node.op == "call_module":
        module: Callable[..., Any] = root.get_submodule(str(node.target))
        return module
    assert callable(node.target)
    return node.target


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for name in path.split("."):
        value = getattr(value, name)
    return value


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
