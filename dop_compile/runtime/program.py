"""Lower a pruned graph to steps: compiled pieces with attention and cache between them.

Attention kernels, masks and the cache run as Hugging Face runs them. What lies between two of them is one *piece*: a
pure function of tensors and modules. Pieces of the same kind - the same operations on modules of the same structure,
whatever the layer or the tier - share one function, so that a decoder compiles once per kind of block and the time to
compile does not grow with its depth.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import fx, nn

from dop_compile import ops
from dop_compile.hf.kernels import MASK_BUILDERS
from dop_compile.hf.mixers import ignores_padding
from dop_compile.passes.blocks import IndexSpec
from dop_compile.passes.graph import DecoderGraph
from dop_compile.runtime.direct import Site, canonical, is_plain, torch_state
from dop_compile.runtime.lines import STATE, Method, Step, Value, Weight, straight_line
from dop_compile.runtime.pieces import PieceLibrary, call_module, piece_kind
from dop_compile.tokens import TokenSet
from dop_compile.tracing.trace import is_length, is_packed

__all__ = ["Program", "building"]

_RUNTIME_TARGETS = {
    ops.update_cache,
    ops.select_attention_mask,
    ops.select_padding_mask,
    ops.zero_keyless,
    ops.preview_cache,
    ops.rank_tokens,
    ops.ranked_index,
}

MaskBuilder = Callable[..., Any]
_builder: ContextVar[MaskBuilder | None] = ContextVar("builder", default=None)


@contextmanager
def building(builder: MaskBuilder) -> Iterator[None]:
    """Have a function called for each mask that programs build in this thread: with Hugging Face's builder, and what
    that is called with.
    """
    token = _builder.set(builder)
    try:
        yield
    finally:
        _builder.reset(token)


def _building(function: MaskBuilder, *args: Any, **kwargs: Any) -> Any:
    builder = _builder.get()
    return function(*args, **kwargs) if builder is None else builder(function, *args, **kwargs)


class Program:
    """A runnable decoder for one keep table, one kind of request and one set of inputs."""

    def __init__(self, graph: DecoderGraph, library: PieceLibrary):
        self.universe = graph.universe
        self.blocks = tuple(graph.blocks)
        self.reports = tuple(graph.reports)
        self.output_tokens = graph.output_tokens
        self.output_class = graph.traced.output_class
        self.layer_keys: dict[int, tuple[TokenSet, TokenSet | None]] = {
            block.layer: (block.keys, None if block.held == block.keys else block.held)
            for block in self.blocks
            if block.update is not None or (graph.cached and block.source is not None)
        }
        """Of each layer with entries in the cache, the keys that it sees, and those among which they are, if more."""
        attentions = [block for block in self.blocks if block.attention is not None]
        partial = {block.tokens for block in attentions if not block.tokens.is_all or not block.keys.is_all}
        self.grids: tuple[TokenSet, ...] = ()
        """Sets whose slots masks are made of; none where rankings move tokens between sets on the way."""
        if graph.keep.ranking is None:
            mixing = [*attentions, *(block for block in self.blocks if block.mixer is not None)]
            self.grids = tuple(partial | {block.held for block in mixing if not block.keys.is_all})
        mixers = [(block.mixer, block.keys) for block in self.blocks if block.mixer is not None]
        self.sequences: frozenset[TokenSet] = frozenset(keys for _, keys in mixers)
        """The sequences of its mixers, which keep a state of them."""
        root, hidden = graph.traced.root, int(graph.traced.root.decoder.config.hidden_size)  # type: ignore[union-attr, arg-type]
        self.ignores_padding = all(ignores_padding(root.get_submodule(str(node.target)), hidden) for node, _ in mixers)
        self.needs_mask = any(
            user.target not in MASK_BUILDERS
            for node in graph.graph.find_nodes(op="placeholder", target="attention_mask")
            for user in node.users
        )
        self.modules: tuple[nn.Module, ...] = ()
        """All that its steps call or read, and what is in these."""
        self._held: list[nn.Module] = []
        self._library = library
        self._values: dict[fx.Node, Value] = {}
        self._inputs: dict[Value, str | IndexSpec] = {}
        self._steps: list[Step] = []
        self.pieces: list[str] = []
        self._run = self._lower(graph)
        self.source: str = self._run.source
        self.modules = tuple({part: None for module in self._held for part in module.modules()})
        del self._values, self._inputs, self._steps, self._held

    @functools.cached_property
    def is_plain(self) -> bool:
        """Whether nothing but weights and settings can change inside of its modules; see `direct`."""
        return all(is_plain(module, settings=True) for module in self.modules)

    # --- lowering -------------------------------------------------------------------------------------------------

    def _value(self, node: fx.Node) -> Value:
        return self._values.setdefault(node, Value(len(self._values)))

    def _lower(self, graph: DecoderGraph) -> Any:
        self._root = graph.traced.root
        piece: list[fx.Node] = []
        waiting: list[fx.Node] = []
        waiting_set: set[fx.Node] = set()
        modules: dict[fx.Node, nn.Module] = {}
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                if node.users:
                    self._inputs[self._value(node)] = node.meta.get("index", node.name)
            elif node.op == "get_attr" and isinstance(value := _attribute(self._root, str(node.target)), nn.Module):
                modules[node] = value
                self._held.append(value)
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
        (result,) = graph.output.args
        assert isinstance(result, fx.Node)
        self.indices = tuple(key for key in self._inputs.values() if isinstance(key, IndexSpec))
        return straight_line(self._inputs, self._steps, self._value(result), type(self._root).__name__)

    def _is_runtime(self, node: fx.Node) -> bool:
        # Packed tokens have data-dependent shapes: left to run as they are
        if is_packed(node.meta.get("val")) or any(is_packed(n.meta.get("val")) for n in node.all_input_nodes):
            return True
        if is_length(node) or node.meta.get("mixer"):
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
                return modules[n] if n in modules else self._value(n)

            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), refer)
            result = (self._value(node),)
            function = _callable(node, self._root)
            if isinstance(function, nn.Module):
                self._held.append(function)
            self._steps.append(Step(function, args, kwargs, result))
            if self._library.guards_strides and any(not self._is_runtime(user) for user in node.users):
                self._steps.append(Step(canonical, result, {}, result))
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
                    slots.append(self._value(source))
            if node.op in ("call_module", "get_attr"):
                value = _attribute(self._root, str(node.target))
                holder = graph.placeholder(f"x{len(slots)}")
                slots.append(value if node.op == "call_module" else self._weight(str(node.target)))
                held[holder.name] = value
                self._held.append(value if isinstance(value, nn.Module) else slots[-1].owner)
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
        outputs = tuple(self._value(node) for node in results)
        arguments = tuple(slots)
        if self._library.passes_guards:
            function = site = Site(function, slots)
            arguments = (STATE, *site.values)
        # A graph's code sets each argument to None behind its last use; compiled code is called with all of them
        own_code = self._library.backend == "eager"
        self._steps.append(Step(function, arguments, {}, outputs, unpacked=True, handed_over=own_code))

    def _weight(self, path: str) -> Weight:
        owner, _, name = path.rpartition(".")
        return Weight(self._root.get_submodule(owner), name)

    # --- running --------------------------------------------------------------------------------------------------

    def __call__(self, inputs: dict[str, Any], index: Callable[[IndexSpec], Any]) -> Any:
        """Run the decoder.

        Args:
            inputs: graph inputs by name (see `TracedDecoder`), plus `masks` and `cache_view`.
            index: computes an index tensor of the batch.

        Returns:
            last hidden states of the requested rows (batch, requested, hidden).
        """
        state = torch_state() if self._library.passes_guards else None
        return self._run(lambda key: inputs[key] if isinstance(key, str) else index(key), state)


def _callable(node: fx.Node, root: nn.Module) -> Callable[..., Any] | Method:
    if node.op == "call_method":
        return Method(str(node.target))
    if node.op == "call_module":
        module: Callable[..., Any] = root.get_submodule(str(node.target))
        return module
    assert callable(node.target)
    if node.target in MASK_BUILDERS:
        return functools.partial(_building, node.target)
    return node.target


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for name in path.split("."):
        value = getattr(value, name)
    return value
