"""Index tensors against plain Python loops over the slots of every row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dop_compile.ops import token_add, token_merge, token_slice
from dop_compile.runtime.layout import NO_TOKEN, TokenLayout
from dop_compile.tokens import Atom, TokenSet, Universe

GROUPS = ("system", "visual", "text")


@dataclass
class Drawn:
    universe: Universe
    codes: list[list[int]]
    requested: list[list[bool]]

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout(self.universe, torch.tensor(self.codes), torch.tensor(self.requested), torch.device("cpu"))

    def slots_of(self, tokens: TokenSet) -> list[list[int]]:
        """Per row the slots of the set, ascending; the full set includes padding."""
        length = len(self.codes[0])
        if tokens.is_all:
            return [list(range(length)) for _ in self.codes]

        def is_member(code: int, requested: bool) -> bool:
            return code != NO_TOKEN and self._atom(code, requested) in tokens.atoms

        return [
            [slot for slot in range(length) if is_member(codes[slot], wanted[slot])]
            for codes, wanted in zip(self.codes, self.requested, strict=True)
        ]

    def _atom(self, code: int, requested: bool) -> Atom:
        return Atom(self.universe.groups[code], requested or self.universe.all_requested)


@st.composite
def layouts(draw: st.DrawFn) -> Drawn:
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    wanted = draw(st.none() | st.frozensets(st.sampled_from(GROUPS)))
    codes, requested = [], []
    for _ in range(batch):
        row = draw(st.lists(st.integers(NO_TOKEN, 2), min_size=length, max_size=length))
        flags = [
            code != NO_TOKEN and (wanted is None or (GROUPS[code] in wanted and draw(st.booleans()))) for code in row
        ]
        codes.append(row)
        requested.append(flags)
    return Drawn(Universe(GROUPS, wanted), codes, requested)


def _subset(data: st.DataObject, tokens: TokenSet) -> TokenSet:
    atoms = data.draw(st.frozensets(st.sampled_from(sorted(tokens.atoms)))) if tokens else frozenset()
    return TokenSet(atoms, tokens.universe)


def _grid(rows: list[list[int]]) -> tuple[int, list[list[int | None]]]:
    """Rows right-aligned in a grid that is never empty."""
    width = max(1, *(len(row) for row in rows))
    return width, [[None] * (width - len(row)) + row for row in rows]


def _values(slots: list[list[int]], width: int) -> Tensor:
    """A stream whose value at a position tells row and slot; padding is NaN, so that reading it shows."""
    out = torch.full((len(slots), width, 2), float("nan"))
    for row, own in enumerate(slots):
        for column, slot in enumerate(own, start=width - len(own)):
            out[row, column] = torch.tensor([row, slot])
    return out


def _check(result: Tensor, slots: list[list[int]]) -> None:
    width, grid = _grid(slots)
    assert result.shape[1] == width
    for row, columns in enumerate(grid):
        for column, slot in enumerate(columns):
            if slot is not None:
                assert result[row, column].tolist() == [row, slot]


@given(layouts(), st.data())
def test_slots_counts_and_validity(drawn: Drawn, data: st.DataObject) -> None:
    tokens = _subset(data, drawn.universe.all)
    expected = drawn.slots_of(tokens)
    slots, valid = drawn.layout.slots(tokens)
    width, grid = _grid(expected)
    assert drawn.layout.count(tokens) == width == slots.shape[1]
    assert valid.tolist() == [[slot is not None for slot in row] for row in grid]
    assert [[s for s, ok in zip(a, b, strict=True) if ok]
            for a, b in zip(slots.tolist(), valid.tolist(), strict=True)] == expected  # fmt: skip
    tokens_per_sample = [sum(drawn.codes[row][slot] != NO_TOKEN for slot in own) for row, own in enumerate(expected)]
    assert drawn.layout.tokens_per_sample(tokens) == tokens_per_sample


@given(layouts(), st.data())
def test_gather(drawn: Drawn, data: st.DataObject) -> None:
    source = _subset(data, drawn.universe.all)
    tokens = _subset(data, source)
    layout = drawn.layout
    stream = _values(drawn.slots_of(source), layout.count(source))
    _check(token_slice(stream, layout.index("gather", tokens, (source,))), drawn.slots_of(tokens))


@given(layouts(), st.data())
def test_scatter(drawn: Drawn, data: st.DataObject) -> None:
    target = _subset(data, drawn.universe.all)
    tokens = _subset(data, target)
    layout = drawn.layout
    update = _values(drawn.slots_of(tokens), layout.count(tokens)) + 100
    stream = torch.zeros(len(drawn.codes), layout.count(target), 2)
    result = token_add(stream, update, layout.index("scatter", tokens, (target,)))
    member = [set(row) for row in drawn.slots_of(tokens)]
    _, grid = _grid(drawn.slots_of(target))
    for row, columns in enumerate(grid):
        for column, slot in enumerate(columns):
            wanted = [row + 100, slot + 100] if slot in member[row] else [0, 0]
            assert result[row, column].tolist() == wanted, "padding, too, is left as it is"


@given(layouts(), st.data())
def test_merge(drawn: Drawn, data: st.DataObject) -> None:
    first = _subset(data, drawn.universe.all)
    second = _subset(data, drawn.universe.all - first)
    tokens = _subset(data, first | second)
    if tokens.is_all:  # then padding is read too, which no source but the full set holds
        drawn.codes = [[max(code, 0) for code in row] for row in drawn.codes]
        drawn.requested = [[drawn.universe.all_requested or flag for flag in row] for row in drawn.requested]
    layout = drawn.layout
    streams = [_values(drawn.slots_of(part), layout.count(part)) for part in (first, second)]
    _check(token_merge(layout.index("merge", tokens, (first, second)), *streams), drawn.slots_of(tokens))


@given(layouts(), st.data())
def test_slicing_along_other_dimensions(drawn: Drawn, data: st.DataObject) -> None:
    """Rotary tables (rows, batch, tokens, dim) and heads (batch, heads, tokens, dim)."""
    tokens = _subset(data, drawn.universe.all)
    layout = drawn.layout
    index = layout.index("gather", tokens, (drawn.universe.all,))
    stream = torch.randn(len(drawn.codes), len(drawn.codes[0]), 2)
    expected = token_slice(stream, index)
    assert torch.equal(token_slice(stream[None].expand(3, -1, -1, -1), index, 1, 2)[2], expected)
    heads = stream[:, None].expand(-1, 4, -1, -1)
    assert torch.equal(token_slice(heads, index, 0, 2)[:, 3], expected)


def test_indices_are_made_once() -> None:
    requested = torch.ones(1, 3, dtype=torch.bool)
    layout = TokenLayout(Universe(GROUPS), torch.tensor([[0, 1, 2]]), requested, torch.device("cpu"))
    visual = layout.universe.groups_set(["visual"])
    first, again = (layout.index("gather", visual, (layout.universe.all,)) for _ in range(2))
    assert first is again
