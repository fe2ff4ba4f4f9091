"""Drop operations whose result reaches neither a requested row nor a key/value entry that will be read or cached.

Requires: annotated blocks with the sets that the policy keeps.
Ensures:  the sets of every block are shrunk to what is live, found backwards from the requested output rows.
Numerics: exact on every requested number up to rounding (a matrix product over fewer rows may round differently).

Cases: 1. visual updates after the last layer that reads visual keys; 2. everything but the requested rows in the last
layer; 3. keys and values that, without a cache, no live query reads; 4. rows before a stream transform that works
token by token (DeepStack) stay as they are.  Kept: 5. rows before any other transform, which may mix tokens; 6. rows
that a ranking inside the decoder reads, and those that it has not told apart yet.
"""

from __future__ import annotations

from dop_compile.passes.blocks import MHA, Block
from dop_compile.passes.graph import DecoderGraph
from dop_compile.passes.infra import Pass
from dop_compile.passes.report import PassReport
from dop_compile.tokens import TokenSet

__all__ = ["REMOVE_DEAD", "find_live"]


def find_live(graph: DecoderGraph, sets: dict[str, tuple[TokenSet, TokenSet]]) -> dict[str, tuple[TokenSet, TokenSet]]:
    """What is live of each block's (tokens, keys), by block name."""
    needed = graph.universe.requested
    live: dict[str, tuple[TokenSet, TokenSet]] = {}
    stages = graph.stages
    for number, junction in reversed(list(enumerate(graph.junctions))):
        stage = stages.at(number)
        if stages.reads_stream and stage is not None:
            needed = needed | stages.read_from_stream(stage)
        needed = stages.close(needed, number)
        if not junction.blocks:
            needed = needed if junction.token_wise else graph.universe.all
            continue
        after = needed
        for block in junction.blocks:
            tokens, keys = sets[block.name]
            rated = stages.rated(stage) if block.attends and stage is not None else graph.universe.none
            tokens = tokens & (after | rated)
            if block.kind == MHA and not graph.cached and not tokens:
                keys = graph.universe.none
            live[block.name] = tokens, keys
            needed = needed | tokens | keys
    return live


def _remove_dead(graph: DecoderGraph, report: PassReport) -> None:
    live = find_live(graph, {block.name: (block.tokens, block.keys) for block in graph.blocks})
    for junction in graph.junctions:
        if not junction.blocks and not junction.token_wise:
            report.kept.append(f"{junction.out.name}: may mix tokens, so everything before it is live")
    for block in graph.blocks:
        if _shrink(block, *live[block.name]):
            report.rewritten += 1
        else:
            report.kept.append(f"{block.name}: every operation is live")


def _shrink(block: Block, tokens: TokenSet, keys: TokenSet) -> bool:
    changed = (tokens, keys) != (block.tokens, block.keys)
    block.tokens, block.keys = tokens, keys
    return changed


REMOVE_DEAD = Pass("remove_dead", _remove_dead, after=("annotate",), before=("slice_operations",))
