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
values are computed, for the cache; 6. parallel branches of one junction, each for its own tokens; 7. keys and values
that later layers read too: computed for all that any of these layers sees, and each masks what it does not.
Refused: 8. a value without exactly one token dimension where it has to be sliced; 9. an attention mask that is computed
from the hidden states.
"""

from __future__ import annotations

import operator

from torch import fx

from dop_compile import ops
from dop_compile.hf.mixers import with_padding_mask
from dop_compile.passes.block_view import BlockView, attention_arguments, select_mask, sides
from dop_compile.passes.blocks import MHA, Block, Junction
from dop_compile.passes.cleanup import eliminate_dead_nodes
from dop_compile.passes.graph import DecoderGraph
from dop_compile.passes.infra import Pass
from dop_compile.passes.rank_tokens import rank_in_layer
from dop_compile.passes.report import PassReport

__all__ = ["SLICE_OPERATIONS"]


def _emit_attention(graph: DecoderGraph, block: Block, stream: fx.Node) -> fx.Node | None:
    if block.source is not None and not block.tokens:
        block.attention = None
        return None
    queries, keys = sides(graph, block, stream)
    query, key, value, mask = attention_arguments(block)
    kernel = block.attention
    assert kernel is not None
    for reader in [other.attention for other in graph.readers(block) if other.attention is not None]:
        reader.update_arg(2, keys.get(key))
        reader.update_arg(3, keys.get(value))
    if block.update is not None:
        stored = keys.get(block.update)
        block.update.meta.pop("effect")  # the copy stores the keys and values now
        block.update = stored
    if not block.tokens:
        block.attention = None
        return None
    selected, visible = select_mask(graph, block, mask)
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


def _emit_mixer(graph: DecoderGraph, block: Block, stream: fx.Node) -> fx.Node | None:
    """The mixer on the tokens of its sequence, and what follows it on those that it updates."""
    mixer = block.mixer
    assert mixer is not None
    assert block.branch is not None
    mixer.meta.pop("effect", None)  # the copy keeps the state now
    block.mixer = None
    if not block.keys:
        return None
    sliced = graph.slice(stream, block.keys, graph.universe.all, f"{block.name}_slice")
    view = BlockView(graph, block, block.keys, {stream: sliced})
    args, kwargs = mixer.args, mixer.kwargs
    if not block.keys.is_all:  # the grid of all tokens holds the prompt's padding, which the model's own mask tells
        arguments = (graph.masks, block.keys)
        mask = graph.call(ops.select_padding_mask, arguments, name=f"{block.name}_padding_mask", layer=block.layer)
        module = graph.traced.root.get_submodule(str(mixer.target))
        args, kwargs = with_padding_mask(module, args, kwargs, mask)
    args, kwargs = fx.map_arg((args, kwargs), view.get)
    copy = graph.graph.create_node(mixer.op, mixer.target, args, kwargs)
    copy.meta = {**mixer.meta, "tokens": block.keys, "layer": block.layer, "effect": graph.cached}
    block.mixer = graph.rename(copy, f"{block.name}_mixer")
    if not block.tokens:
        return None
    known = {stream: graph.slice(sliced, block.tokens, block.keys), mixer: graph.slice(copy, block.tokens, block.keys)}
    branch: fx.Node = BlockView(graph, block, block.tokens, known).get(block.branch)
    return branch


def _emit_mlp(graph: DecoderGraph, block: Block, stream: fx.Node) -> fx.Node | None:
    if not block.tokens:
        return None
    assert block.branch is not None
    sliced = graph.slice(stream, block.tokens, graph.universe.all, f"{block.name}_slice")
    branch: fx.Node = BlockView(graph, block, block.tokens, {stream: sliced}).get(block.branch)
    return branch


def _emit(graph: DecoderGraph, block: Block, stream: fx.Node) -> fx.Node | None:
    if block.mixes:
        return _emit_mixer(graph, block, stream)
    return (_emit_attention if block.kind == MHA else _emit_mlp)(graph, block, stream)


def _rewrite(graph: DecoderGraph, junction: Junction) -> None:
    everything = graph.universe.all
    with graph.graph.inserting_before(junction.out):
        current = junction.stream
        for block in junction.blocks:
            branch = block.branch
            if not block.is_whole:
                branch = _emit(graph, block, junction.stream)
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
        if block.attention is not None and graph.cached and block.is_whole:
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
    _, _, _, mask = attention_arguments(block)
    with graph.graph.inserting_before(kernel):
        kernel.update_arg(4, select_mask(graph, block, mask)[0])


SLICE_OPERATIONS = Pass("slice_operations", _slice_operations, optional=False, after=("annotate",))
