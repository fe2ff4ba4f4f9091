"""Drop operations whose result reaches neither a requested row nor a key/value entry that will be read or cached.

Requires: annotated blocks with the sets that the policy keeps.
Ensures:  the sets of every block are shrunk to what is live, found backwards from the requested output rows.
Numerics: exact on every requested number up to rounding (a matrix product over fewer rows may round differently).

Cases: 1. visual updates after the last layer that reads visual keys; 2. everything but the requested rows in the last
layer; 3. keys and values that, without a cache, no live query reads; 4. rows before a stream transform that works
token by token (DeepStack) stay as they are.  Kept: 5. rows before any other transform, which may mix tokens.
"""

from __future__ import annotations

from dop_compile.passes.infra import MHA, DecoderGraph, Pass, PassReport

__all__ = ["REMOVE_DEAD"]


def _remove_dead(graph: DecoderGraph, report: PassReport) -> None:
    needed = graph.universe.requested
    for junction in reversed(graph.junctions):
        if not junction.blocks:
            if not junction.token_wise:
                needed = graph.universe.all
                report.kept.append(f"{junction.out.name}: may mix tokens, everything before it is live")
            continue
        after = needed
        for block in junction.blocks:
            tokens, keys = block.tokens & after, block.keys
            if block.kind == MHA and not graph.cached and not tokens:
                keys = graph.universe.none
            if (tokens, keys) == (block.tokens, block.keys):
                report.kept.append(f"{block.name}: every operation is live")
            else:
                block.tokens, block.keys = tokens, keys
                report.rewritten += 1
            needed = needed | tokens | keys


REMOVE_DEAD = Pass("remove_dead", _remove_dead)
