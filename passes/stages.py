"""When the passes may tell apart tokens that are ranked inside the decoder.

Until a stage has run, the tokens that it will drop and those that it will keep are the same to the graph: every token
set holds all of them or none. A stage that reads attention alone has run once the attention of its layer has, so that
what drops out is spared the layer's MLP; one that reads the residual stream, once its layer has.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING

from dop_compile.rankings import Criterion, criterion
from dop_compile.tokens import Atom, TokenSet

if TYPE_CHECKING:
    from dop_compile.passes.graph import DecoderGraph, IndexSpec

__all__ = ["Stages"]


class Stages:
    """The ranking stages of one annotated graph, by number."""

    def __init__(self, graph: DecoderGraph):
        self._graph = graph
        ranking = graph.keep.ranking
        self.stages = ranking.stages if ranking is not None else ()
        self.criterion: Criterion | None = None
        if ranking is not None:
            self.criterion = criterion(ranking.criterion, dict(ranking.options))

    @property
    def reads_stream(self) -> bool:
        return self.criterion is not None and self.criterion.reads_stream

    @cached_property
    def junctions(self) -> tuple[int, ...]:
        """For each stage, the number of the junction that it runs in or, reading the stream, behind."""
        numbers = []
        for stage in self.stages:
            of_layer = [
                number
                for number, junction in enumerate(self._graph.junctions)
                if any(block.layer == stage.layer for block in junction.blocks)
            ]
            numbers.append(of_layer[-1 if self.reads_stream else 0])
        return tuple(numbers)

    def at(self, number: int) -> int | None:
        """The stage that runs in or behind a junction."""
        return next((stage for stage, junction in enumerate(self.junctions) if junction == number), None)

    def rated(self, stage: int) -> TokenSet:
        """Tokens whose queries a stage reads."""
        assert self.criterion is not None
        groups = set(self.criterion.raters)
        if "visual" in groups:
            groups |= self._groups(stage)
        return self._graph.universe.groups_set(groups)

    def read_from_stream(self, stage: int) -> TokenSet:
        """Tokens whose states a stage reads: the visual tokens that are left, and the text."""
        return self._graph.universe.groups_set({"text", *self._groups(stage)})

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
