"""The decoder graph as the passes see it: what they read, and the only ways in which they change it."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from dop_compile import ops
from dop_compile.errors import PassError
from dop_compile.passes.blocks import Block, IndexSpec, Junction
from dop_compile.passes.report import PassReport
from dop_compile.passes.stages import Stages
from dop_compile.policy.keep import KeepTable
from dop_compile.tokens import TokenSet, Universe
from dop_compile.tracing.proxies import BATCH, TOKENS
from dop_compile.tracing.trace import TracedDecoder

__all__ = ["DecoderGraph", "depends_on", "has_tokens", "is_add", "token_dims"]


@dataclass
class DecoderGraph:
    """A decoder graph on its way through the pipeline."""

    traced: TracedDecoder
    keep: KeepTable
    universe: Universe
    cached: bool
    junctions: list[Junction] = field(default_factory=list)
    entry: fx.Node | None = None
    indices: dict[IndexSpec, fx.Node] = field(default_factory=dict)
    diffs: dict[str, str] = field(default_factory=dict)
    reports: list[PassReport] = field(default_factory=list)
    output_tokens: TokenSet = field(init=False)
    stages: Stages = field(init=False)
    rank_nodes: dict[int, fx.Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.output_tokens = self.universe.all
        self.stages = Stages(self)

    @property
    def graph(self) -> fx.Graph:
        return self.traced.graph

    @property
    def output(self) -> fx.Node:
        return self.graph.output_node()

    def has_run(self, name: str) -> bool:
        return any(report.name == name for report in self.reports)

    @property
    def blocks(self) -> Iterator[Block]:
        return (block for junction in self.junctions for block in junction.blocks)

    def readers(self, block: Block) -> list[Block]:
        """The blocks of later layers that read the keys and values of this one."""
        return [other for other in self.blocks if other.source is block]

    @property
    def masks(self) -> fx.Node:
        """The graph input that selects rows and columns of attention masks; made on first use."""
        return self._input("masks")

    @property
    def rankings(self) -> fx.Node:
        """The graph input that ranking nodes act on; made on first use."""
        return self._input("rankings")

    @property
    def residual_stream(self) -> fx.Node:
        """The graph input of a graph that begins at a later layer: what enters it; made on first use."""
        return self._input("residual_stream")

    def _input(self, name: str) -> fx.Node:
        found: list[fx.Node] = self.graph.find_nodes(op="placeholder", target=name)
        if not found:
            with self._after_inputs():
                found = [self.graph.placeholder(name)]
        return found[0]

    def _after(self, node: fx.Node, index: fx.Node) -> Any:
        """Insert where a node and an index tensor for it are both known."""
        if index.op != "placeholder":
            first = next(n for n in self.graph.nodes if n is node or n is index)
            return self.graph.inserting_after(index if first is node else node)
        return self._after_inputs() if node.op == "placeholder" else self.graph.inserting_after(node)

    def _after_inputs(self) -> Any:
        """Insert where the graph's inputs end."""
        first = next((node for node in self.graph.nodes if node.op != "placeholder"), None)
        return self.graph.inserting_before(first) if first is not None else contextlib.nullcontext()

    def index(self, kind: str, tokens: TokenSet, *others: TokenSet) -> fx.Node:
        """The node that holds an index tensor, made on first use: an input, or what a ranking has to come before."""
        spec = IndexSpec(kind, tokens, tuple(others))
        if spec not in self.indices:
            stage = self.stages.needed_for(spec)
            if stage is None:
                with self._after_inputs():
                    node: fx.Node = self.graph.placeholder(spec.name)
            else:
                with self.graph.inserting_after(self.rank_nodes[stage]):
                    arguments = (self.rank_nodes[stage], kind, tokens, tuple(others))
                    node = self.call(ops.ranked_index, arguments, name=spec.name)
            node.meta["index"] = spec
            self.indices[spec] = node
        return self.indices[spec]

    def call(
        self, target: Any, args: tuple[Any, ...], *, name: str, like: fx.Node | None = None, **meta: Any
    ) -> fx.Node:
        """A new call of a function, named for what it does; its value looks like that of `like`."""
        node = self.graph.call_function(target, args)
        node.meta = {**({} if like is None else _kept_meta(like)), **meta}
        return self.rename(node, name)

    def rename(self, node: fx.Node, name: str) -> fx.Node:
        node.name = self.graph._graph_namespace.create_name(name, None)
        node.meta.setdefault("pass", self.reports[-1].name if self.reports else "")
        return node

    def slice(self, node: fx.Node, tokens: TokenSet, source: TokenSet, name: str = "", **meta: Any) -> fx.Node:
        """`node`, laid out as `source`, narrowed to `tokens`; made once, right after `node`."""
        if tokens == source:
            return node
        batch_dim, token_dim = token_dims(node)
        index = self.index("gather", tokens, source)
        for user in node.users:
            if user.target is ops.token_slice and user.args[:2] == (node, index):
                return user
        with self._after(node, index):
            extra = () if (batch_dim, token_dim) == (0, 1) else (batch_dim, token_dim)
            arguments = (node, index, *extra)
            name = name or f"{node.name}_{tokens}"
            return self.call(ops.token_slice, arguments, name=name, like=node, tokens=tokens, source=source, **meta)


def _kept_meta(node: fx.Node) -> dict[str, Any]:
    return {key: node.meta[key] for key in ("val", "nn_module_stack", "layer") if key in node.meta}


def token_dims(node: fx.Node) -> tuple[int, int]:
    """Batch and token dimension of a node's value, read off its example value."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        sizes = list(value.shape)
        if sizes.count(BATCH) == 1 and sizes.count(TOKENS) == 1:
            return sizes.index(BATCH), sizes.index(TOKENS)
    raise PassError(
        "slice_operations",
        f"the value {tuple(value.shape) if isinstance(value, Tensor) else value} has no batch and token dimension to "
        "slice along",
        node=node.name,
    )


def has_tokens(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and TOKENS in value.shape


def depends_on(graph: fx.Graph, cut: Collection[fx.Node] = ()) -> tuple[dict[fx.Node, int], dict[fx.Node, int]]:
    """Position of each node and its ancestors (itself included) as a bit set; nodes in `cut` count as inputs."""
    position: dict[fx.Node, int] = {}
    ancestors: dict[fx.Node, int] = {}
    for number, node in enumerate(graph.nodes):
        position[node] = number
        bits = 1 << number
        if node not in cut:
            for source in node.all_input_nodes:
                bits |= ancestors[source]
        ancestors[node] = bits
    return position, ancestors


def is_add(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in (operator.add, torch.add)
