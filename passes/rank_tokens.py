"""The nodes that rank visual tokens inside the decoder; `slice_operations` puts them where their stages stand.

A ranking node reads the queries and keys that the layer's kernel reads - a few rows of attention are computed from
them, so that the kernel may be any - and gives the layout that index tensors of later token sets are made from.

A stage that reads the next layer gets queries and keys of its own, made as that layer makes them (norm, projections,
rotation) of all tokens that are left:

    before   q, k = q_proj(norm(x)), k_proj(norm(x));  k, v = update_cache(cache, k, v);  attention(q, k, v)
    after    q', k' = q_proj(norm(x)), k_proj(norm(x));  layout = rank_tokens(q', preview_cache(cache, k'))
             the layer as before, for x[what is kept]
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

from torch import fx

from dop_compile import ops
from dop_compile.errors import PassError
from dop_compile.hf.kernels import eager_attention
from dop_compile.passes.block_view import BlockView, ancestors_inside, attention_arguments, select_mask, sides
from dop_compile.passes.blocks import Block, Junction
from dop_compile.passes.graph import DecoderGraph
from dop_compile.tokens import TokenSet

__all__ = ["rank_in_layer"]


def rank_in_layer(graph: DecoderGraph, number: int, junction: Junction) -> None:
    """Emit the stage that stands at a junction, if one does: behind its kernel, or behind the layer."""
    stage = graph.stages.at(number)
    if stage is None:
        return
    block = _attention_block(graph, graph.stages.layer(stage))
    kernel = block.attention
    if kernel is None:
        raise PassError("slice_operations", "no token attends in a layer that ranks tokens", layer=block.layer)
    _check(graph, block, kernel)
    if graph.stages.reads_next:
        if graph.stages.stages[stage].group in graph.universe.groups:
            graph.rank_nodes[stage] = _rank_before(graph, stage, block, kernel, junction.out)
        return
    stream = held = None
    place = kernel
    if graph.stages.reads_stream:
        held = graph.stages.read_from_stream(stage)
        stream = place = graph.slice(junction.out, held, graph.universe.all, f"{block.name}_ranked")
    module, query, key, value, mask = kernel.args
    sets, settings = _sets(block), dict(kernel.kwargs)
    arguments = (graph.rankings, stage, module, (query, key, value), mask, sets, settings, stream, held)
    with graph.graph.inserting_after(place):
        node = graph.call(ops.rank_tokens, arguments, name=f"{block.name}_rank", layer=block.layer, effect=True)
    graph.rank_nodes[stage] = node


def _rank_before(graph: DecoderGraph, stage: int, block: Block, kernel: fx.Node, stream: fx.Node) -> fx.Node:
    """Rank by the queries and keys that a block would have if no token left before it."""
    queries, keys = graph.stages.next_sets(stage)
    supplies = keys if block.source is None else block.supplies
    ahead = replace(block, kind="ahead", tokens=queries, keys=keys, supplies=supplies)
    query, key, _, mask = attention_arguments(ahead)
    with graph.graph.inserting_before(kernel):
        query_side, key_side = sides(graph, ahead, stream)
        if block.update is not None:
            key_side.known[block.update] = _preview(graph, ahead, block.update, key, key_side)
        seen = key_side.get(key)
        tensors = (query_side.get(query), seen, seen)  # of the kernel's results weights alone are read, not values
        selected, _ = select_mask(graph, ahead, mask)
        arguments = (graph.rankings, stage, kernel.args[0], tensors, selected, _sets(ahead), dict(kernel.kwargs))
        return graph.call(
            ops.rank_tokens, (*arguments, None, None), name=f"{ahead.name}_rank", layer=block.layer, effect=True
        )


def _sets(block: Block) -> tuple[TokenSet, TokenSet, TokenSet | None]:
    """Queries, the keys that they see, and those among which these are, if more."""
    return block.tokens, block.keys, None if block.held == block.keys else block.held


def _preview(graph: DecoderGraph, block: Block, update: fx.Node, key: fx.Node, view: BlockView) -> fx.Node:
    """What the layer would hold; without values unless keys are made of them, as where latent ones are stored."""
    cache, new, values, layer = update.args[:4]
    needed = ancestors_inside(block, [key])
    reads_values = any(user.args[1] != 0 for user in update.users if user in needed)
    arguments = (cache, view.get(new), view.get(values) if reads_values else None, layer)  # type: ignore[arg-type]
    return graph.call(ops.preview_cache, arguments, name=f"{block.name}_keys", layer=block.layer)


def _attention_block(graph: DecoderGraph, layer: int) -> Block:
    attentions = {block.layer: block for block in graph.blocks if block.attends}
    if layer not in attentions:
        raise PassError(
            "slice_operations",
            f"layer {layer} has no attention whose queries and keys could rank tokens; layers {sorted(attentions)} "
            "have one",
            layer=layer,
        )
    return attentions[layer]


def _check(graph: DecoderGraph, block: Block, kernel: fx.Node) -> None:
    module: Any = kernel.args[0]
    found = operator.attrgetter(str(module.target))(graph.traced.root) if isinstance(module, fx.Node) else module
    if eager_attention(found) is None:
        raise PassError(
            "slice_operations",
            f"{type(found).__name__} has no eager attention with weights for a ranking inside the decoder to read",
            layer=block.layer,
        )
