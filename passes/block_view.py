"""One block's nodes emitted again for some tokens: what slicing an operation, and looking at one ahead, are made of."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx

from dop_compile import ops
from dop_compile.errors import PassError
from dop_compile.passes.blocks import Block
from dop_compile.passes.graph import DecoderGraph, has_tokens
from dop_compile.tokens import TokenSet

__all__ = ["BlockView", "ancestors_inside", "attention_arguments", "select_mask", "sides"]


class BlockView:
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


def ancestors_inside(block: Block, targets: list[fx.Node]) -> set[fx.Node]:
    """The nodes of the block that the targets are computed from, and these."""
    inside, found, stack = set(block.nodes), set(), list(targets)
    while stack:
        node = stack.pop()
        if node in inside and node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def attention_arguments(block: Block) -> tuple[fx.Node, fx.Node, fx.Node, Any]:
    """Query, key, value and mask of the block's kernel."""
    assert block.attention is not None
    _, query, key, value, mask = block.attention.args
    if isinstance(mask, fx.Node) and mask in block.nodes:
        raise PassError(
            "slice_operations", "the attention mask depends on the hidden states", node=mask.name, layer=block.layer
        )
    return query, key, value, mask  # type: ignore[return-value]


def sides(graph: DecoderGraph, block: Block, stream: fx.Node) -> tuple[BlockView, BlockView]:
    """A view of the block for its queries and one for the keys that it supplies, sharing what both need.

    What it reads of an earlier layer is laid out as that one supplies it, and taken as it is.
    """
    union = graph.slice(stream, block.reads, graph.universe.all, f"{block.name}_slice")
    query, key, value, _ = attention_arguments(block)
    if block.source is not None:
        both = BlockView(graph, block, block.tokens, {stream: union, key: key, value: value})
        return both, both
    if block.tokens == block.supplies:
        both = BlockView(graph, block, block.tokens, {stream: union})
        return both, both
    stores = [block.update] if block.update is not None else []
    query_side = ancestors_inside(block, [query])
    key_side = ancestors_inside(block, [key, value, *stores])
    shared = {node for node in query_side & key_side if isinstance(node.meta.get("val"), Tensor)}
    common = BlockView(graph, block, block.reads, {stream: union})
    frontier = [
        node
        for node in (stream, *block.nodes)
        if (node is stream or node in shared) and any(user not in shared for user in node.users if user in block.nodes)
    ]
    block.fused = any(node.op == "call_module" and _has_matrix(graph, node) for node in shared)
    views = []
    for tokens in (block.tokens, block.supplies):
        known = {node: graph.slice(common.get(node), tokens, block.reads) for node in frontier}
        views.append(BlockView(graph, block, tokens, known))
    return views[0], views[1]


def _has_matrix(graph: DecoderGraph, node: fx.Node) -> bool:
    """Whether a module projects (a norm does not)."""
    return any(p.dim() > 1 for p in graph.traced.root.get_submodule(str(node.target)).parameters())


def select_mask(graph: DecoderGraph, block: Block, mask: Any) -> tuple[fx.Node, fx.Node]:
    """The layer's part of the model's mask, and which queries see a key."""
    name, layer = block.name, block.layer
    among = () if block.held == block.keys else (block.held,)
    arguments = (mask, graph.masks, layer, block.tokens, block.keys, *among)
    selected = graph.call(ops.select_attention_mask, arguments, name=f"{name}_select_mask", layer=layer)
    parts = [
        graph.call(operator.getitem, (selected, number), name=f"{name}_{part}", layer=layer)
        for number, part in enumerate(("mask", "visible"))
    ]
    return parts[0], parts[1]
