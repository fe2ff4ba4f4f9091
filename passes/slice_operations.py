"""Make every block compute for its own tokens only: gather before it, add back after it.

Requires: annotated blocks whose sets say who takes part (queries and keys apart).
Ensures:  a block's nodes see only the block's tokens, and its output is added back to those tokens alone.
Numerics: exact with respect to the policy's semantics; a block that keeps every token is not touched, except that the
          branches of a parallel junction are added one after the other (rounding).

    before   add(x, o_proj(attention(q_proj(norm(x)), k_proj(norm(x)), v_proj(norm(x)))))
    after    u = norm(token_slice(x, Q | K))                                  what both sides share, once
             token_add(x, o_proj(attention(q_proj(u[Q]), k_proj(u[K]), v_proj(u[K]))))

Cases: 1. joint MHA, the same tokens as queries and keys; 2. queries and keys apart, the shared part computed once for
their union; 3. a fused projection is part of what is shared: sliced after it; 4. MLP; 5. no query left: only keys and
values are computed, for the cache; 6. parallel branches of one junction, each for its own tokens.
Refused: 7. a value without exactly one token dimension where it has to be sliced; 8. an attention mask that is computed
from the hidden states.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx

from dop_compile import ops
from dop_compile.errors import PassError
from dop_compile.passes.cleanup import eliminate_dead_nodes
from dop_compile.passes.graph import MHA, Block, DecoderGraph, Junction, has_tokens
from dop_compile.passes.infra import Pass, PassReport
from dop_compile.passes.rank_tokens import rank_in_layer
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
        copy = self.graph.graph.create_node(node.op, node.target, args, kwargs)
        copy.meta = {**node.meta, "tokens": self.tokens, "layer": self.block.layer}
        prefix = f"{self.graph.traced.layer_prefix}.{self.block.layer}."
        name = str(node.target).removeprefix(prefix).replace(".", "_") if node.op == "call_module" else node.name
        return self.graph.rename(copy, f"{self.block.name}_{name}")


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
        raise PassError(
            "slice_operations", "the attention mask depends on the hidden states", node=mask.name, layer=block.layer
        )
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
    block.fused = any(node.op == "call_module" and _has_matrix(graph, node) for node in shared)
    views = []
    for tokens in (block.tokens, block.keys):
        known = {node: graph.slice(common.get(node), tokens, block.reads) for node in frontier}
        views.append(_View(graph, block, tokens, known))
    return views[0], views[1]


def _has_matrix(graph: DecoderGraph, node: fx.Node) -> bool:
    """Whether a module projects (a norm does not)."""
    return any(p.dim() > 1 for p in graph.traced.root.get_submodule(str(node.target)).parameters())


def _select_mask(graph: DecoderGraph, block: Block, mask: Any) -> tuple[fx.Node, fx.Node]:
    """The layer's part of the model's mask, and which queries see a key."""
    name, layer = block.name, block.layer
    arguments = (mask, graph.masks, layer, block.tokens, block.keys)
    selected = graph.call(ops.select_attention_mask, arguments, name=f"{name}_select_mask", layer=layer)
    parts = [
        graph.call(operator.getitem, (selected, number), name=f"{name}_{part}", layer=layer)
        for number, part in enumerate(("mask", "visible"))
    ]
    return parts[0], parts[1]


def _emit_attention(graph: DecoderGraph, block: Block, stream: fx.Node) -> fx.Node | None:
    queries, keys = _sides(graph, block, stream)
    query, key, value, mask = _attention_arguments(block)
    kernel = block.attention
    assert kernel is not None
    if block.update is not None:
        stored = keys.get(block.update)
        block.update.meta.pop("effect")  # the copy stores the keys and values now
        block.update = stored
    if not block.tokens:
        block.attention = None
        return None
    selected, visible = _select_mask(graph, block, mask)
    arguments = (kernel.args[0], queries.get(query), keys.get(key), keys.get(value), selected)
    attention = graph.graph.create_node("call_function", kernel.target, arguments, dict(kernel.kwargs))
    attention.meta = {**kernel.meta, "layer": block.layer, "tokens": block.tokens}
    graph.rename(attention, f"{block.name}_attention")
    meta = {"tokens": block.tokens, "layer": block.layer}
    for user in list(kernel.users):
        name = f"{block.name}_attention_{'out' if user.args[1] == 0 else 'weights'}"
        taken = graph.call(operator.getitem, (attention, user.args[1]), name=name, like=user, **meta)
        if user.args[1] == 0:
            taken = graph.call(ops.zero_keyless, (taken, visible), name=f"{name}_keyless_zero", like=user, **meta)
        queries.known[user] = taken
    block.attention = attention
    assert block.branch is not None
    branch: fx.Node = queries.get(block.branch)
    return branch


def _emit_mlp(graph: DecoderGraph, block: Block, stream: fx.Node) -> fx.Node | None:
    if not block.tokens:
        return None
    assert block.branch is not None
    sliced = graph.slice(stream, block.tokens, graph.universe.all, f"{block.name}_slice")
    branch: fx.Node = _View(graph, block, block.tokens, {stream: sliced}).get(block.branch)
    return branch


def _rewrite(graph: DecoderGraph, junction: Junction) -> None:
    everything = graph.universe.all
    with graph.graph.inserting_before(junction.out):
        current = junction.stream
        for block in junction.blocks:
            branch = block.branch
            if not block.is_whole:
                branch = (_emit_attention if block.kind == MHA else _emit_mlp)(graph, block, junction.stream)
                block.branch = branch
            if branch is None:
                continue
            name, meta = f"{block.name}_out", {"tokens": everything, "written": block.tokens, "layer": block.layer}
            if block.tokens.is_all:
                current = graph.call(operator.add, (current, branch), name=name, like=junction.out, **meta)
            else:
                index = graph.index("scatter", block.tokens, everything)
                current = graph.call(ops.token_add, (current, branch, index), name=name, like=junction.out, **meta)
    junction.out.replace_all_uses_with(current)
    for other in graph.junctions:
        if other.stream is junction.out:
            other.stream = current
    junction.out = current


def _slice_operations(graph: DecoderGraph, report: PassReport) -> None:
    for block in list(graph.blocks):
        if block.kind == MHA and graph.cached and block.is_whole:
            _follow_cache(graph, block)
    for number, junction in enumerate(graph.junctions):
        partial = [block for block in junction.blocks if not block.is_whole]
        if partial:
            _rewrite(graph, junction)
        rank_in_layer(graph, number, junction)
        report.rewritten += len(partial)
        report.kept += [f"{block.name}: every token takes part" for block in junction.blocks if block.is_whole]
    eliminate_dead_nodes(graph.graph)


def _follow_cache(graph: DecoderGraph, block: Block) -> None:
    """A layer that keeps every new token may still hold a pruned past: its mask has to follow the stored entries."""
    kernel = block.attention
    assert kernel is not None
    _, _, _, mask = _attention_arguments(block)
    with graph.graph.inserting_before(kernel):
        kernel.update_arg(4, _select_mask(graph, block, mask)[0])


SLICE_OPERATIONS = Pass("slice_operations", _slice_operations, optional=False, after=("annotate",))
