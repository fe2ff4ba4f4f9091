"""When the passes may tell apart tokens that are ranked inside the decoder.

Until a stage has run, the tokens that it will drop and those that it will keep are the same to the graph: every token
set holds all of them or none. A stage that reads attention alone has run once the attention of its layer has, so that
what drops out is spared the layer's MLP; one that reads the residual stream, or what the next layer makes of it, once
its layer has.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Protocol

from dop_compile.passes.blocks import IndexSpec, Junction
from dop_compile.policy.keep import KeepTable
from dop_compile.rankings import Criterion, criterion
from dop_compile.tokens import Atom, TokenSet, Universe

__all__ = ["Stages"]


class Annotated(Protocol):
    """What the stages are told by of their graph, which they are a part of."""

    keep: KeepTable
    universe: Universe
    junctions: list[Junction]


class Stages:
    """The ranking stages of one annotated graph, by number."""

    def __init__(self, graph: Annotated):
        self._graph = graph
        ranking = graph.keep.ranking
        self.stages = ranking.stages if ranking is not None else ()
        self.criterion: Criterion | None = None
        if ranking is not None:
            self.criterion = criterion(ranking.criterion, dict(ranking.options))

    @property
    def reads_stream(self) -> bool:
        """Whether stages read the stream behind their layer, be it as the next layer's queries and keys."""
        return self.criterion is not None and (self.criterion.reads_stream or self.criterion.reads_next)

    @property
    def reads_next(self) -> bool:
        return self.criterion is not None and self.criterion.reads_next

    def layer(self, stage: int) -> int:
        """The layer whose queries and keys a stage reads."""
        return self.stages[stage].layer + self.reads_next

    @cached_property
    def junctions(self) -> tuple[int, ...]:
        """For each stage, the number of the junction that it runs in or, reading the stream, behind."""
        numbers = []
        for stage in range(len(self.stages)):
            of_layer = [
                number
                for number, junction in enumerate(self._graph.junctions)
                if any(block.layer == self.layer(stage) for block in junction.blocks)
            ]
            if self.reads_next:  # right before its attention, behind whatever changes the stream between two layers
                numbers.append(of_layer[0] - 1)
            else:
                numbers.append(of_layer[-1 if self.reads_stream else 0])
        return tuple(numbers)

    def at(self, number: int) -> int | None:
        """The stage that runs in or behind a junction."""
        return next((stage for stage, junction in enumerate(self.junctions) if junction == number), None)

    def rated(self, stage: int) -> TokenSet:
        """Tokens whose queries a stage reads of those that its layer computes."""
        assert self.criterion is not None
        if self.reads_next:
            return self._graph.universe.none
        groups = set(self.criterion.raters)
        if "visual" in groups:
            groups |= self._groups(stage)
        return self._graph.universe.groups_set(groups)

    def read_from_stream(self, stage: int) -> TokenSet:
        """Tokens whose states a stage reads: the visual tokens that are left, and the text, or what attends next."""
        if self.reads_next:
            queries, keys = self.next_sets(stage)
            return queries | keys
        return self._graph.universe.groups_set({"text", *self._groups(stage)})

    def next_sets(self, stage: int) -> tuple[TokenSet, TokenSet]:
        """Queries and keys of the next layer if no token left before it."""
        row, staying = self._graph.keep.layers[self.layer(stage)], self._groups(stage + 1)
        queries, keys = (
            self._graph.universe.groups_set(groups | self._groups(stage) if groups & staying else groups)
            for groups in (row.query, row.key_value)
        )
        return queries, keys

    def close(self, tokens: TokenSet, number: int, behind: bool = False) -> TokenSet:
        """`tokens` and what cannot be told from them in junction `number`.

        Args:
            behind: in the streams right before the junction; what is ranked by the stream leaves it one later.
        """
        late = 1 if behind and self.reads_stream else 0
        done = sum(junction + late < number for junction in self.junctions)
        alike = self._groups(done)
        if len(alike) < 2:
            return tokens
        flags = {atom.requested for atom in tokens.atoms if atom.group in alike}
        more = {Atom(group, flag) for group in alike for flag in flags} & set(self._graph.universe.atoms)
        return TokenSet(tokens.atoms | more, tokens.universe)

    def needed_for(self, spec: IndexSpec) -> int | None:
        """The last stage that must have run before an index tensor is known; None if there is none."""
        return max((n for tokens in (spec.tokens, *spec.others) for n in self._told_apart(tokens)), default=None)

    def _told_apart(self, tokens: TokenSet) -> Iterable[int]:
        """Stages whose tokens are members where some that stay longer are not, or the reverse."""
        for number, stage in enumerate(self.stages):
            if stage.group not in self._graph.universe.groups:
                continue
            for flag in (False, True):
                known = Atom(stage.group, flag) in tokens.atoms
                if any((Atom(group, flag) in tokens.atoms) != known for group in self._groups(number + 1)):
                    yield number

    def _groups(self, done: int) -> set[str]:
        """The groups of the program that cannot be told apart after so many stages."""
        groups = {"visual", *(stage.group for stage in self.stages[done:])} if self.stages else set()
        return groups & set(self._graph.universe.groups)
