"""Junctions on a residual stream, the blocks between them, and the index tensors that move tokens between sets.

A *junction* is an addition to the residual stream (or a step that replaces it); a *block* is one MHA or MLP branch of
a junction, with the token sets it computes for. Index tensors that move tokens between sets are inputs of the graph,
described by an `IndexSpec`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from dop_compile.policy.keep import LayerKeep
from dop_compile.tokens import TokenSet, Universe

__all__ = ["MHA", "MLP", "Block", "IndexSpec", "Junction", "block_sets"]

MHA, MLP = "mha", "mlp"


@dataclass(frozen=True)
class IndexSpec:
    """An index tensor that the graph takes as an input and `TokenLayout` computes for each batch."""

    kind: str  # "gather", "scatter" or "merge"
    tokens: TokenSet
    others: tuple[TokenSet, ...]

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.tokens}_in_{'_and_'.join(str(other) for other in self.others)}"


@dataclass
class Block:
    """A residual branch: everything between a stream value and the addition of the branch to the stream.

    For attention `tokens` are the queries and `keys` the tokens that supply keys and values; for an MLP `keys` is
    empty. A block that `mixes` has a token mixer in place of the attention: `keys` are its sequence, `tokens` those of
    them that its output is added to. `branch` is None once no token is left to compute for. `fused` says that queries,
    keys and values come from one projection, which therefore runs for all tokens that are any of them. `part` numbers
    the MLP branches or token mixers of a layer that has several (Gemma 4 adds an MLP that reads per-layer embeddings,
    Falcon H1 a state space beside the attention).
    """

    kind: str
    layer: int
    branch: fx.Node | None
    nodes: tuple[fx.Node, ...]
    tokens: TokenSet
    keys: TokenSet
    attention: fx.Node | None = None
    update: fx.Node | None = None
    mixer: fx.Node | None = None
    mixes: bool = False
    fused: bool = False
    part: int = 0

    @property
    def name(self) -> str:
        return f"L{self.layer:02d}_{self.kind}{self.part + 1 if self.part else ''}"

    @property
    def attends(self) -> bool:
        return self.kind == MHA and not self.mixes

    @property
    def reads(self) -> TokenSet:
        return self.tokens | self.keys

    @property
    def is_whole(self) -> bool:
        """Whether every token takes part in every way."""
        return self.tokens.is_all and (self.kind != MHA or self.keys.is_all)


def block_sets(universe: Universe, row: LayerKeep, kind: str, *, mixes: bool) -> tuple[TokenSet, TokenSet]:
    """The `tokens` and `keys` that a layer's row of the keep table gives a block.

    Who is not in a mixer's sequence has nothing to read there: its queries are those that are also keys.
    """
    if kind == MLP:
        return universe.groups_set(row.mlp), universe.none
    queries, keys = universe.groups_set(row.query), universe.groups_set(row.key_value)
    return (queries & keys, keys) if mixes else (queries, keys)


@dataclass
class Junction:
    """``out = stream + sum of branches``; parallel MHA and MLP share one. A transform replaces the stream instead."""

    stream: fx.Node
    out: fx.Node
    blocks: tuple[Block, ...]
    token_wise: bool = True

    @property
    def writes(self) -> TokenSet | None:
        sets = [block.tokens for block in self.blocks]
        return None if not sets else _union(sets)

    @property
    def reads(self) -> TokenSet | None:
        sets = [block.reads for block in self.blocks]
        return None if not sets else _union(sets)


def _union(sets: Sequence[TokenSet]) -> TokenSet:
    result = sets[0]
    for tokens in sets[1:]:
        result = result | tokens
    return result
