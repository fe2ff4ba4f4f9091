"""Junctions on a residual stream, the blocks between them, and the index tensors that move tokens between sets.

A *junction* is an addition to the residual stream (or a step that replaces it); a *block* is one MHA or MLP branch of
a junction, with the token sets it computes for. Index tensors that move tokens between sets are inputs of the graph,
described by an `IndexSpec`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from dop_compile.policy.keep import KeepTable
from dop_compile.tokens import TokenSet, Universe

__all__ = ["MHA", "MLP", "Block", "BlockSets", "IndexSpec", "Junction", "policy_sets", "supplied"]

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

    For attention `tokens` are the queries and `keys` the tokens that they see; for an MLP `keys` is empty. Keys and
    values are computed of the tokens that it `supplies`: its own `keys` and, where later layers read those of this one,
    theirs. Such a reader supplies none and names the block that does, its `source`. A block that `mixes` has a token
    mixer in place of the attention: `keys` are its sequence, `tokens` those of them that its output is added to.
    `branch` is None once no token is left to compute for. `fused` says that queries, keys and values come from one
    projection, which therefore runs for all tokens that are any of them. `part` numbers the MLP branches or token
    mixers of a layer that has several (Gemma 4 adds an MLP that reads per-layer embeddings, Falcon H1 a state space
    beside the attention).
    """

    kind: str
    layer: int
    branch: fx.Node | None
    nodes: tuple[fx.Node, ...]
    tokens: TokenSet
    keys: TokenSet
    supplies: TokenSet
    source: Block | None = None
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
    def sets(self) -> BlockSets:
        return BlockSets(self.tokens, self.keys, self.supplies)

    @sets.setter
    def sets(self, sets: BlockSets) -> None:
        self.tokens, self.keys, self.supplies = sets.tokens, sets.keys, sets.supplies

    @property
    def attends(self) -> bool:
        return self.kind == MHA and not self.mixes

    @property
    def reads(self) -> TokenSet:
        return self.tokens | self.supplies

    @property
    def held(self) -> TokenSet:
        """The tokens whose keys and values the kernel is given, of which the queries see `keys`."""
        return self.supplies if self.source is None else self.source.supplies

    @property
    def is_whole(self) -> bool:
        """Whether every token takes part in every way."""
        return self.tokens.is_all and (self.kind != MHA or self.keys.is_all)


@dataclass(frozen=True)
class BlockSets:
    """The token sets of a `Block`, by the names that they have there."""

    tokens: TokenSet
    keys: TokenSet
    supplies: TokenSet


def policy_sets(blocks: Sequence[Block], universe: Universe, keep: KeepTable) -> dict[str, BlockSets]:
    """The sets that the rows of a keep table give blocks, which are in the order of the layers; by block name.

    Who is not in a mixer's sequence has nothing to read there: its queries are those that are also keys.
    """
    sets: dict[str, BlockSets] = {}
    read: dict[str, TokenSet] = {}  # by later layers
    for block in reversed(blocks):
        row = keep.layers[block.layer]
        if block.kind == MLP:
            sets[block.name] = BlockSets(universe.groups_set(row.mlp), universe.none, universe.none)
            continue
        queries, keys = universe.groups_set(row.query), universe.groups_set(row.key_value)
        queries = queries & keys if block.mixes else queries
        sets[block.name] = BlockSets(queries, keys, supplied(block, keys, read))
    return sets


def supplied(block: Block, keys: TokenSet, read: dict[str, TokenSet]) -> TokenSet:
    """What a block with these keys supplies; call it from the last block to the first.

    `read` holds, by name of their source, the tokens whose keys the blocks before (later layers) see.
    """
    if block.source is None:
        return keys | read.get(block.name, keys)
    read[block.source.name] = keys | read.get(block.source.name, keys)
    return keys.universe.none


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
