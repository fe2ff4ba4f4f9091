"""Make every block compute for its own tokens only: gather before it, add back after it.

Requires: annotated blocks whose sets say who takes part (queries and keys apart).
Ensures:  a block's nodes see only the block's tokens, and its output is added back to those tokens alone.
Numerics: exact with respect to the policy's semantics; a block that keeps every token is not touched.

    before   add(x, o_proj(attention(q_proj(norm(x)), k_proj(norm(x)), v_proj(norm(x)))))
    after    u = norm(token_slice(x, Q | K))                                  what both sides share, once
             token_add(x, o_proj(attention(q_proj(u[Q]), k_proj(u[K]), v_proj(u[K]))))

Cases: 1. joint MHA, the same tokens as queries and keys; 2. queries and keys apart, the shared part computed once for
their union; 3. a fused projection is part of what is shared: sliced after it; 4. MLP; 5. no query left: only keys and
values are computed, for the cache; 6. parallel branches of one junction, each for its own tokens.
Refused: 7. a value without exactly one token dimension where it has to be sliced.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx

from dop_compile import ops
from dop_compile.errors import PassError
from dop_compile.passes.infra import (
    MHA,
    Block,
    DecoderGraph,
    Junction,
    Pass,
    PassReport,
    eliminate_dead_nodes,
    has_tokens,
)
from dop_compile.tokens import TokenSet

__all__ = ["SLICE_OPERATIONS"]


class _View:
    """The nodes of one block re-emitted for one token set; nodes are cloned when something asks for them."""

    def __init__(self, graph: DecoderGraph, block: Block, tokens: TokenSet, known: dict[fx.Node, Any]):
        self.graph = graph
        self.block = block
        self.tokens = tokens
        self.known = known
        self.inside = set(block.nodes)

    def get(self, node: fx.Node) -> Any:
        if node not in self.known:
            if node not in self.inside:
                self.known[node] = self._outside(node)
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), self.get)
                self.known[node] = self._emit(node, args, kwargs)
        return self.known[node]

    def _outside(self, node: fx.Node) -> fx.Node:
        return self.graph.slice(node, self.tokens, self.graph.universe.all) if has_tokens(node) else node

    def _emit(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        copy = self.graph.graph.create_node(node.op, node.target, args, kwargs, name=f"{self.block.name}_{node.name}")
        copy.meta = dict(node.meta)
        copy.meta["tokens"] = self.tokens
        return copy


def _ancestors_inside(block: Block, targets: list[fx.Node]) -> set[fx.Node]:
    inside, found, stack = set(block.nodes), set(), list(targets)
    while stack:
        node = stack.pop()
        if node in inside and node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _attention_arguments(block: Block) -> tuple[fx.Node, fx.Node, fx.Node, Any]:
    assert block.attention is not None
    _, query, key, value, mask = block.attention.args
    if isinstance(mask, fx.Node) and mask in block.nodes:
        raise PassError("slice_operations", "the attention mask depends on the hidden states", node=mask.name)
    return query, key, value, mask  # type: ignore[return-value]


def _sides(graph: DecoderGraph, block: Block, stream: fx.Node) -> tuple[_View, _View]:
    """A view of the block for its queries and one for its keys, sharing what both need."""
    union = graph.slice(stream, block.reads, graph.universe.all, f"{block.name}_slice")
    if block.tokens == block.keys:
        both = _View(graph, block, block.tokens, {stream: union})
        return both, both
    query, key, value, _ = _attention_arguments(block)
    stores = [block.update] if block.update is not None else []
    query_side = _ancestors_inside(block, [query])
    key_side = _ancestors_inside(block, [key, value, *stores])
    shared = {node for node in query_side & key_side if isinstance(node.meta.get("val"), Tensor)}
    common = _View(graph, block, block.reads, {stream: union})
    frontier = [
        node
        for node in (stream, *block.nodes)
        if (node is stream or node in shared) and any(user not in shared for user in node.users if user in block.nodes)
    ]
    block.fused = any(node.op == "call_module" and "norm" not in str(node.target) and node in shared for node in shared)
    views = []
    for tokens in (block.tokens, block.keys):
        known = {node: graph.slice(common.get(node), tokens, block.reads) for node in frontier}
        views.append(_View(graph, block, tokens, known))
    return views[0], views[1]


def _emit_attention(graph: DecoderGraph, block: Block, stream: fx.Node) -> fx.Node | None:
    queries, keys = _sides(graph, block, stream)
    query, key, value, mask = _attention_arguments(block)
    kernel = block.attention
    assert kernel is not None
    if block.update is not None:
        keys.get(block.update)
        block.update.meta.pop("effect")  # the copy stores the keys and values now
    if not block.tokens:
        return None
    module = kernel.args[0]
    selected = graph.graph.call_function(
        ops.select_attention_mask, (mask, graph.masks, block.layer, block.tokens, block.keys)
    )
    pieces = [graph.graph.call_function(operator.getitem, (selected, number)) for number in (0, 1)]
    arguments = (module, queries.get(query), keys.get(key), keys.get(value), pieces[0])
    attention = graph.graph.create_node("call_function", kernel.target, arguments, dict(kernel.kwargs))
    attention.meta = {**kernel.meta, "layer": block.layer}
    for user in list(kernel.users):
        taken = graph.graph.call_function(operator.getitem, (attention, user.args[1]))
        taken.meta = dict(user.meta)
        if user.args[1] == 0:
            out = graph.graph.call_function(ops.zero_keyless, (taken, pieces[1]))
            out.meta = dict(user.meta)
            taken = out
        queries.known[user] = taken
    branch: fx.Node = queries.get(block.branch)
    return branch


def _emit_mlp(graph: DecoderGraph, block: Block, stream: fx.Node) -> fx.Node | None:
    if not block.tokens:
        return None
    sliced = graph.slice(stream, block.tokens, graph.universe.all, f"{block.name}_slice")
    branch: fx.Node = _View(graph, block, block.tokens, {stream: sliced}).get(block.branch)
    return branch


def _rewrite(graph: DecoderGraph, junction: Junction) -> None:
    everything = graph.universe.all
    with graph.graph.inserting_before(junction.out):
        current = junction.stream
        for block in junction.blocks:
            whole = block.tokens.is_all and (block.kind != MHA or block.keys.is_all)
            emit = _emit_attention if block.kind == MHA else _emit_mlp
            branch = block.branch if whole else emit(graph, block, junction.stream)
            if branch is None:
                continue
            if block.tokens.is_all:
                added = graph.graph.call_function(operator.add, (current, branch))
            else:
                index = graph.index("scatter", block.tokens, everything)
                added = graph.graph.call_function(ops.token_add, (current, branch, index))
            added.meta = {**junction.out.meta, "tokens": everything, "written": block.tokens}
            added.name = graph.graph._graph_namespace.create_name(f"{block.name}_out", None)
            block.branch = branch
            current = added
    junction.out.replace_all_uses_with(current)
    for other in graph.junctions:
        if other.stream is junction.out:
            other.stream = current
    junction.out = current


def _slice_operations(graph: DecoderGraph, report: PassReport) -> None:
    for block in list(graph.blocks):
        if block.kind == MHA and graph.cached and block.tokens.is_all and block.keys.is_all:
            _follow_cache(graph, block)
    for junction in graph.junctions:
        partial = [b for b in junction.blocks if not (b.tokens.is_all and (b.kind != MHA or b.keys.is_all))]
        if partial:
            _rewrite(graph, junction)
        report.rewritten += len(partial)
        report.kept += [f"{b.name}: every token takes part" for b in junction.blocks if b not in partial]
    eliminate_dead_nodes(graph.graph)


def _follow_cache(graph: DecoderGraph, block: Block) -> None:
    """A layer that keeps every new token may still hold a pruned past: its mask has to follow the stored entries."""
    kernel = block.attention
    assert kernel is not None
    _, _, _, mask = _attention_arguments(block)
    with graph.graph.inserting_before(kernel):
        selected = graph.graph.call_function(
            ops.select_attention_mask, (mask, graph.masks, block.layer, block.tokens, block.keys)
        )
        kernel.update_arg(4, graph.graph.call_function(operator.getitem, (selected, 0)))


SLICE_OPERATIONS = Pass("slice_operations", _slice_operations, optional=False)
