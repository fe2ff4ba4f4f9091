"""What a pass is: requires -> rewrite -> report, on one decoder graph.

A pass is a function of a `DecoderGraph` that changes it in place and returns a `PassReport`. Every skip carries its
reason. The pipeline times each pass, records a diff of the graph's canonical text, verifies after every pass in debug
mode, and names the failing pass and those that ran before it.
"""

from __future__ import annotations

import contextlib
import difflib
import operator
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from dop_compile import ops
from dop_compile.errors import PassError
from dop_compile.keep import KeepTable
from dop_compile.tokens import TokenSet, Universe
from dop_compile.trace import BATCH, TOKENS, TracedDecoder

__all__ = [
    "Block",
    "DecoderGraph",
    "IndexSpec",
    "Junction",
    "Pass",
    "PassReport",
    "depends_on",
    "dump",
    "eliminate_dead_nodes",
    "eliminate_duplicates",
    "run_passes",
    "token_dims",
]

MHA, MLP, TRANSFORM = "mha", "mlp", "transform"


@dataclass(frozen=True)
class IndexSpec:
    """An index tensor that the graph takes as an input and `TokenLayout` computes for each batch."""

    kind: str  # "gather", "scatter" or "merge"
    tokens: TokenSet
    others: tuple[TokenSet, ...]

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.tokens}_in_{'_and_'.join(str(other) for other in self.others)}"


@dataclass
class Block:
    """A residual branch: everything between a stream value and the addition of the branch to the stream.

    For attention `tokens` are the queries and `keys` the tokens that supply keys and values; for an MLP `keys` is
    empty. `sliced` says whether the branch already computes for these sets alone.
    """

    kind: str
    layer: int
    branch: fx.Node
    nodes: tuple[fx.Node, ...]
    tokens: TokenSet
    keys: TokenSet
    attention: fx.Node | None = None
    update: fx.Node | None = None
    fused: bool = False

    @property
    def name(self) -> str:
        return f"L{self.layer:02d}_{self.kind}"

    @property
    def reads(self) -> TokenSet:
        return self.tokens | self.keys


@dataclass
class Junction:
    """``out = stream + sum of branches``; parallel MHA and MLP share one. A transform replaces the stream instead."""

    stream: fx.Node
    out: fx.Node
    blocks: tuple[Block, ...]
    token_wise: bool = True

    @property
    def writes(self) -> TokenSet | None:
        sets = [block.tokens for block in self.blocks]
        return None if not sets else _union(sets)

    @property
    def reads(self) -> TokenSet | None:
        sets = [block.reads for block in self.blocks]
        return None if not sets else _union(sets)


def _union(sets: Sequence[TokenSet]) -> TokenSet:
    result = sets[0]
    for tokens in sets[1:]:
        result = result | tokens
    return result


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

    def __post_init__(self) -> None:
        self.output_tokens = self.universe.all

    @property
    def graph(self) -> fx.Graph:
        return self.traced.graph

    @property
    def output(self) -> fx.Node:
        return next(node for node in reversed(self.graph.nodes) if node.op == "output")

    @property
    def blocks(self) -> Iterator[Block]:
        return (block for junction in self.junctions for block in junction.blocks)

    @property
    def masks(self) -> fx.Node:
        """The graph input that selects rows and columns of attention masks; made on first use."""
        for node in self.graph.nodes:
            if node.op == "placeholder" and node.name == "masks":
                return node
        with self._after_inputs():
            return self.graph.placeholder("masks")

    def _after_inputs(self) -> Any:
        """Insert where the graph's inputs end."""
        first = next((node for node in self.graph.nodes if node.op != "placeholder"), None)
        return self.graph.inserting_before(first) if first is not None else contextlib.nullcontext()

    def index(self, kind: str, tokens: TokenSet, *others: TokenSet) -> fx.Node:
        """The graph input that holds an index tensor; made on first use."""
        spec = IndexSpec(kind, tokens, tuple(others))
        if spec not in self.indices:
            with self._after_inputs():
                node = self.graph.placeholder(spec.name)
            node.meta["index"] = spec
            self.indices[spec] = node
        return self.indices[spec]

    def slice(self, node: fx.Node, tokens: TokenSet, source: TokenSet, name: str = "") -> fx.Node:
        """`node`, laid out as `source`, narrowed to `tokens`; made once, right after `node`."""
        if tokens == source:
            return node
        batch_dim, token_dim = token_dims(node)
        index = self.index("gather", tokens, source)
        for user in node.users:
            if user.target is ops.token_slice and user.args[:2] == (node, index):
                return user
        with self._after_inputs() if node.op == "placeholder" else self.graph.inserting_after(node):
            extra = () if (batch_dim, token_dim) == (0, 1) else (batch_dim, token_dim)
            sliced = self.graph.call_function(ops.token_slice, (node, index, *extra))
        sliced.meta = {**_kept_meta(node), "tokens": tokens, "source": source}
        if name:
            sliced.name = self.graph._graph_namespace.create_name(name, None)
        return sliced


def _kept_meta(node: fx.Node) -> dict[str, Any]:
    return {key: node.meta[key] for key in ("val", "nn_module_stack") if key in node.meta}


def token_dims(node: fx.Node) -> tuple[int, int]:
    """Batch and token dimension of a node's value, read off its example value."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        sizes = list(value.shape)
        if sizes.count(BATCH) == 1 and sizes.count(TOKENS) == 1:
            return sizes.index(BATCH), sizes.index(TOKENS)
    raise PassError(
        "slice_operations",
        f"its value {tuple(value.shape) if isinstance(value, Tensor) else value} has no batch and token dimension to "
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


@dataclass
class PassReport:
    """What a pass did: how many rewrites, and why it left what it left."""

    name: str
    rewritten: int = 0
    kept: list[str] = field(default_factory=list)
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.name} | {self.rewritten} rewritten, {len(self.kept)} kept | nodes {self.nodes_before} -> "
            f"{self.nodes_after} | {1000 * self.seconds:.0f} ms"
        )


@dataclass(frozen=True)
class Pass:
    """A named rewrite. Passes that are not `optional` define the semantics and cannot be disabled."""

    name: str
    run: Callable[[DecoderGraph, PassReport], None]
    optional: bool = True


def dump(graph: fx.Graph) -> str:
    """Canonical text of a graph, one line a node, for people and for diffs."""

    def show(value: Any) -> str:
        if isinstance(value, fx.Node):
            return value.name
        if isinstance(value, tuple | list):
            return "(" + ", ".join(show(item) for item in value) + ")"
        if isinstance(value, slice):
            return f"{show(value.start)}:{show(value.stop)}"
        if isinstance(value, bool | int | float | str | None | torch.dtype):
            return repr(value)
        return type(value).__name__

    lines = []
    for node in graph.nodes:
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        arguments = [show(a) for a in node.args] + [f"{key}={show(a)}" for key, a in node.kwargs.items()]
        tokens = f"[{node.meta['tokens']}] " if "tokens" in node.meta else ""
        if node.op == "placeholder":
            lines.append(f"{node.name} : input")
        else:
            lines.append(f"{node.name} : {tokens}{target}({', '.join(arguments)})")
    return "\n".join(lines)


def eliminate_dead_nodes(graph: fx.Graph) -> int:
    """Remove what reaches neither the output nor an effect (storing keys and values)."""
    removed = 0
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output") and not node.meta.get("effect"):
            graph.erase_node(node)
            removed += 1
    return removed


_PURE_METHODS = {"size", "view", "transpose", "unsqueeze", "contiguous", "reshape", "to", "float", "type_as"}


def eliminate_duplicates(graph: fx.Graph, only: Callable[[fx.Node], bool] = lambda node: True) -> int:
    """Merge nodes that compute the same thing from the same inputs (values are never changed in place)."""
    seen: dict[Any, fx.Node] = {}
    merged = 0
    for node in list(graph.nodes):
        if node.op in ("placeholder", "output") or node.meta.get("effect") or not only(node):
            continue
        if node.op == "call_function" and node.target in (ops.update_cache, ops.select_attention_mask):
            continue
        key = (node.op, node.target, repr(_hashable(node.args)), repr(_hashable(node.kwargs)))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
            merged += 1
        else:
            seen[key] = node
    return merged


def _hashable(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return ("node", value.name)
    if isinstance(value, tuple | list):
        return tuple(_hashable(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _hashable(item)) for key, item in value.items())
    if isinstance(value, slice):
        return ("slice", _hashable(value.start), _hashable(value.stop), _hashable(value.step))
    if isinstance(value, bool | int | float | str | None | torch.dtype | torch.device) or value is Ellipsis:
        return value
    return ("object", id(value))


def is_add(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in (operator.add, torch.add)


def run_passes(
    graph: DecoderGraph,
    passes: Sequence[Pass],
    *,
    disable: Sequence[str] = (),
    check: Callable[[DecoderGraph], None] | None = None,
    diff: bool = False,
) -> DecoderGraph:
    """Run passes in order.

    Args:
        disable: names of optional passes to leave out.
        check: verifier called after every pass (debug mode, tests).
        diff: keep a unified diff of the canonical dump per pass in `graph.diffs`.

    Raises:
        PassError: a pass failed or left an illegal graph.
        ValueError: `disable` names an unknown pass, or one that the semantics need.
    """
    optional = [item.name for item in passes if item.optional]
    for name in disable:
        if name not in optional:
            raise ValueError(f"disable: {name!r} is not an optional pass; choose from {', '.join(optional)}")
    finished: list[str] = []
    for item in passes:
        if item.name in disable:
            continue
        report = PassReport(item.name, nodes_before=len(graph.graph.nodes))
        before = dump(graph.graph) if diff else ""
        started = time.perf_counter()
        graph.reports.append(report)
        try:
            item.run(graph, report)
            if check is not None:
                check(graph)
        except PassError as error:
            raise PassError(item.name, str(error), node=error.node, finished=tuple(finished)) from error
        report.seconds = time.perf_counter() - started
        report.nodes_after = len(graph.graph.nodes)
        if diff:
            after = dump(graph.graph)
            lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
            graph.diffs[item.name] = "\n".join(lines) or "unchanged"
        finished.append(item.name)
    return graph
