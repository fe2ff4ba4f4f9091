"""Drop operations whose result reaches neither a requested row nor a key/value entry that will be read or cached.

Requires: annotated blocks with the sets that the policy keeps.
Ensures:  the sets of every block are shrunk to what is live, found backwards from the requested output rows.
Numerics: exact on every requested number up to rounding (a matrix product over fewer rows may round differently).

Cases: 1. visual updates after the last layer that reads visual keys; 2. everything but the requested rows in the last
layer; 3. keys and values that, without a cache, no live query reads, in its own layer or in one that reads them too;
4. everything but the requested rows in the last layers, where these supply no keys of their own but read those of
earlier ones; 5. rows before a stream transform that works token by token (DeepStack) stay as they are.  Kept: 6. rows
before any other transform, which may mix tokens; 7. rows that a ranking inside the decoder reads, and those that it
has not told apart yet.
"""

from __future__ import annotations

from dop_compile.passes.blocks import MHA, Block, BlockSets, supplied
from dop_compile.passes.graph import DecoderGraph
from dop_compile.passes.infra import Pass
from dop_compile.passes.report import PassReport
from dop_compile.tokens import TokenSet

__all__ = ["REMOVE_DEAD", "find_live"]


def find_live(graph: DecoderGraph, sets: dict[str, BlockSets]) -> dict[str, BlockSets]:
    """What is live of each block's sets, by block name."""
    needed = graph.universe.requested
    live: dict[str, BlockSets] = {}
    read: dict[str, TokenSet] = {}  # keys of a block, by later layers
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
            tokens, keys = sets[block.name].tokens, sets[block.name].keys
            rated = stages.rated(stage) if block.attends and stage is not None else graph.universe.none
            tokens = tokens & (after | rated)
            if block.kind == MHA and not graph.cached and not tokens:
                keys = graph.universe.none
            live[block.name] = BlockSets(tokens, keys, supplied(block, keys, read) if block.kind == MHA else keys)
            needed = needed | tokens | live[block.name].supplies
    return live


def _remove_dead(graph: DecoderGraph, report: PassReport) -> None:
    live = find_live(graph, {block.name: block.sets for block in graph.blocks})
    for junction in graph.junctions:
        if not junction.blocks and not junction.token_wise:
            report.kept.append(f"{junction.out.name}: may mix tokens, so everything before it is live")
    for block in graph.blocks:
        if _shrink(block, live[block.name]):
            report.rewritten += 1
        else:
            report.kept.append(f"{block.name}: every operation is live")


def _shrink(block: Block, live: BlockSets) -> bool:
    changed = live != block.sets
    block.sets = live
    return changed


REMOVE_DEAD = Pass("remove_dead", _remove_dead, after=("annotate",), before=("slice_operations",))
