"""Lower a pruned graph to steps: compiled pieces with attention and cache between them.

Attention kernels, masks and the cache run as Hugging Face runs them. What lies between two of them is one *piece*: a
pure function of tensors and modules. Pieces of the same kind - the same operations on modules of the same structure,
whatever the layer or the tier - share one function, so that a decoder compiles once per kind of block and the time to
compile does not grow with its depth.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from dop_compile import ops
from dop_compile.hf.kernels import MASK_BUILDERS
from dop_compile.passes.blocks import IndexSpec
from dop_compile.passes.graph import DecoderGraph
from dop_compile.runtime.pieces import PieceLibrary, call_module, piece_kind
from dop_compile.tokens import TokenSet
from dop_compile.tracing.trace import is_length, is_packed

__all__ = ["Program"]

_RUNTIME_TARGETS = {
    ops.update_cache,
    ops.select_attention_mask,
    ops.zero_keyless,
    ops.preview_cache,
    ops.rank_tokens,
    ops.ranked_index,
}


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


@dataclass(frozen=True)
class _Weight:
    """A parameter that a graph reads: looked up in each call, so that a replaced one is followed."""

    owner: nn.Module
    name: str

    def value(self) -> Any:
        return getattr(self.owner, self.name)


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
        self.needs_mask = any(
            user.target not in MASK_BUILDERS
            for node in graph.graph.find_nodes(op="placeholder", target="attention_mask")
            for user in node.users
        )
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
        if is_length(node):
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
        held: dict[str, Any] = {}
        for node in nodes:
            for source in node.all_input_nodes:
                if source not in inside and source not in new:
                    new[source] = graph.placeholder(f"x{len(slots)}")
                    slots.append(_Register(self._register(source)))
            if node.op in ("call_module", "get_attr"):
                value = _attribute(self._root, str(node.target))
                holder = graph.placeholder(f"x{len(slots)}")
                slots.append(value if node.op == "call_module" else self._weight(str(node.target)))
                held[holder.name] = value
                if node.op == "get_attr":
                    new[node] = holder
                    continue
                args = (holder, *fx.map_arg(node.args, new.__getitem__))
                kwargs = fx.map_arg(dict(node.kwargs), new.__getitem__)
                new[node] = graph.call_function(call_module, args, kwargs)
            else:
                new[node] = graph.node_copy(node, new.__getitem__)
        graph.output(tuple(new[node] for node in results))
        kind = piece_kind(graph, held)
        self.pieces.append(kind)
        function = self._library.function(kind, graph)
        outputs = tuple(self._register(node) for node in results)
        self._steps.append(_Step(function, tuple(slots), {}, outputs, is_piece=True))

    def _weight(self, path: str) -> _Weight:
        owner, _, name = path.rpartition(".")
        return _Weight(self._root.get_submodule(owner), name)

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
            if isinstance(a, _Weight):
                return a.value()
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
