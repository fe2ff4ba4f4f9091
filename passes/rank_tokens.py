"""The nodes that rank visual tokens inside the decoder; `slice_operations` puts them where their stages stand.

A ranking node reads the queries and keys that the layer's kernel reads - a few rows of attention are computed from
them, so that the kernel may be any - and gives the layout that index tensors of later token sets are made from.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from dop_compile import ops
from dop_compile.errors import PassError
from dop_compile.passes.graph import MHA, Block, DecoderGraph, Junction
from dop_compile.rankings.view import eager_attention

__all__ = ["rank_in_layer"]


def rank_in_layer(graph: DecoderGraph, number: int, junction: Junction) -> None:
    """Emit the stage that stands at a junction, if one does: behind its kernel, or behind the layer."""
    stage = graph.stages.at(number)
    if stage is None:
        return
    block = _attention_block(graph, graph.stages.stages[stage].layer)
    kernel = block.attention
    if kernel is None:
        raise PassError("slice_operations", "no token attends in a layer that ranks tokens", layer=block.layer)
    _check(graph, block, kernel)
    stream = held = None
    place = kernel
    if graph.stages.reads_stream:
        held = graph.stages.read_from_stream(stage)
        stream = place = graph.slice(junction.out, held, graph.universe.all, f"{block.name}_ranked")
    module, query, key, value, mask = kernel.args
    sets, settings = (block.tokens, block.keys), dict(kernel.kwargs)
    arguments = (graph.rankings, stage, module, (query, key, value), mask, sets, settings, stream, held)
    with graph.graph.inserting_after(place):
        node = graph.call(ops.rank_tokens, arguments, name=f"{block.name}_rank", layer=block.layer, effect=True)
    graph.rank_nodes[stage] = node


def _attention_block(graph: DecoderGraph, layer: int) -> Block:
    return next(block for block in graph.blocks if block.kind == MHA and block.layer == layer)


def _check(graph: DecoderGraph, block: Block, kernel: fx.Node) -> None:
    module: Any = kernel.args[0]
    found = operator.attrgetter(str(module.target))(graph.traced.root) if isinstance(module, fx.Node) else module
    if eager_attention(found) is None:
        raise PassError(
            "slice_operations",
            f"{type(found).__name__} has no eager attention with weights for a ranking inside the decoder to read",
            layer=block.layer,
        )
