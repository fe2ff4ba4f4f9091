"""Begin at a later layer: the residual stream that enters it is an input of its own, all before it goes.

Requires: annotated blocks; no cache, since the layers that go would not fill it.
Ensures:  the first block is the attention of layer `first_layer`, and its stream is the input `residual_stream`.
Numerics: exact; the nodes that stay do not change.

Refused: layers that read the keys and values of one before that layer.
Cases: 1. steps that replace the stream before that layer (DeepStack, scaled embeddings) go with it; 2. what every layer
shares stays, and reads `inputs_embeds` as before: rotary tables, masks, what Gemma 4's layers take of the embeddings.
Does nothing for `first_layer` 0.
"""

from __future__ import annotations

from dop_compile.errors import PassError
from dop_compile.passes.cleanup import eliminate_dead_nodes
from dop_compile.passes.graph import DecoderGraph
from dop_compile.passes.infra import Pass
from dop_compile.passes.report import PassReport

__all__ = ["RESUME"]


def _resume(graph: DecoderGraph, report: PassReport) -> None:
    first = graph.traced.inputs.first_layer
    if first == 0:
        return
    if graph.cached:
        raise PassError("resume", f"a cache would miss the layers before layer {first}", layer=first)
    if not graph.traced.can_begin_at(first):
        raise PassError("resume", f"layers from {first} on read keys and values of earlier layers", layer=first)
    number = next((n for n, step in enumerate(graph.junctions) if any(b.layer >= first for b in step.blocks)), None)
    if number is None:
        raise PassError("resume", f"there is no layer {first}; layers are numbered from 0")
    report.rewritten = number
    stream = graph.junctions[number].stream
    later = graph.junctions[number:]
    given = graph.residual_stream
    given.meta["val"] = stream.meta["val"]
    stream.replace_all_uses_with(given)
    for step in later:
        if step.stream is stream:
            step.stream = given
    graph.junctions, graph.entry = later, given
    eliminate_dead_nodes(graph.graph)


RESUME = Pass("resume", _resume, optional=False, after=("annotate",), before=("remove_dead", "slice_operations"))
