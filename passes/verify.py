"""Check that a graph is legal and prunes what the keep table prunes, and nothing else.

Requires: any graph from `slice_operations` on.
Ensures:  `graph.lint()` holds; every slice, merge and addition uses the index of its own sets; each layer stores keys
          and values once, for exactly the tokens that supply them; each layer has at most one attention kernel, for
          exactly its queries; every set of a block lies inside what the keep table allows.
Numerics: exact; nothing is changed.
"""

from __future__ import annotations

from torch import fx

from dop_compile import ops
from dop_compile.errors import PassError
from dop_compile.passes.infra import MHA, DecoderGraph, Pass, PassReport

__all__ = ["VERIFY", "check_graph"]


def _fail(node: fx.Node | None, message: str) -> None:
    raise PassError("verify", message, node=None if node is None else node.name)


def _check_indices(graph: DecoderGraph) -> None:
    for node in graph.graph.nodes:
        if node.target is ops.token_slice:
            spec = node.args[1].meta["index"]
            if (spec.kind, spec.tokens, spec.others) != ("gather", node.meta["tokens"], (node.meta["source"],)):
                _fail(node, f"slices {node.meta['tokens']} of {node.meta['source']} with the index {spec.name}")
            if not node.meta["tokens"] <= node.meta["source"]:
                _fail(node, f"slices {node.meta['tokens']} out of {node.meta['source']}, which does not hold them")
        elif node.target is ops.token_merge:
            spec = node.args[0].meta["index"]
            if (spec.kind, spec.tokens, spec.others) != ("merge", node.meta["tokens"], node.meta["sources"]):
                _fail(node, f"merges {node.meta['sources']} with the index {spec.name}")
        elif node.target is ops.token_add:
            spec = node.args[2].meta["index"]
            if (spec.kind, spec.tokens) != ("scatter", node.meta["written"]):
                _fail(node, f"adds to {node.meta['written']} with the index {spec.name}")


def _check_layers(graph: DecoderGraph) -> None:
    kernels: dict[int, list[fx.Node]] = {}
    stores: dict[int, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.meta.get("attention"):
            layer = node.meta.get("layer", graph.traced.layer_of(node))
            kernels.setdefault(layer, []).append(node)
        elif node.target is ops.update_cache:
            stores.setdefault(graph.traced.layer_of(node), []).append(node)  # type: ignore[arg-type]
    for block in graph.blocks:
        row, universe = graph.keep.layers[block.layer], graph.universe
        allowed = universe.groups_set(row.query if block.kind == MHA else row.mlp)
        if not block.tokens <= allowed:
            _fail(None, f"{block.name} computes {block.tokens}, the policy keeps {allowed}")
        if block.kind != MHA:
            continue
        if not block.keys <= universe.groups_set(row.key_value):
            _fail(None, f"{block.name} reads keys of {block.keys}, the policy keeps {sorted(row.key_value)}")
        found = len(kernels.get(block.layer, []))
        if found != bool(block.tokens):
            _fail(None, f"{block.name} has {found} attention kernels for the queries {block.tokens}")
        if graph.cached and len(stores.get(block.layer, [])) != (block.update is not None):
            _fail(None, f"{block.name} stores keys and values {len(stores.get(block.layer, []))} times")


def check_graph(graph: DecoderGraph) -> None:
    """Raise `PassError` naming the node where the graph is not what the policy asks for."""
    try:
        graph.graph.lint()
    except RuntimeError as error:
        _fail(None, f"the graph is malformed: {error}")
    if any(report.name == "slice_operations" for report in graph.reports):
        _check_indices(graph)
        _check_layers(graph)


def _verify(graph: DecoderGraph, report: PassReport) -> None:
    check_graph(graph)


VERIFY = Pass("verify", _verify, optional=False)
