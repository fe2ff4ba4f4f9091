"""Token sets: the algebra of sets, and names that tell them apart."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dop_compile.tokens import Atom, TokenSet, Universe

GROUPS = ("system", "visual", "text")


@st.composite
def universes(draw: st.DrawFn) -> Universe:
    count = draw(st.integers(1, 3))
    groups = GROUPS[:count]
    return Universe(groups, draw(st.none() | st.frozensets(st.sampled_from(groups))))


@st.composite
def sets_of(draw: st.DrawFn, universe: Universe) -> TokenSet:
    return TokenSet(draw(st.frozensets(st.sampled_from(universe.atoms))), universe)


@given(st.data(), universes())
def test_algebra_is_that_of_sets_of_atoms(data: st.DataObject, universe: Universe) -> None:
    a, b, c = (data.draw(sets_of(universe)) for _ in range(3))
    assert (a | b).atoms == a.atoms | b.atoms
    assert (a & b).atoms == a.atoms & b.atoms
    assert (a - b).atoms == a.atoms - b.atoms
    assert (a <= b) == (a.atoms <= b.atoms)
    assert bool(a) == bool(a.atoms)
    assert a | (b & c) == (a | b) & (a | c)
    assert a - b == a & (universe.all - b)
    assert a | universe.none == a == a & universe.all
    assert (a == universe.all) == a.is_all
    assert hash(a | b) == hash(b | a)


@given(universes())
def test_atoms_partition_the_groups(universe: Universe) -> None:
    assert len(set(universe.atoms)) == len(universe.atoms)
    assert {atom.group for atom in universe.atoms} == set(universe.groups)
    union = universe.none
    for group in universe.groups:
        part = universe.groups_set([group])
        assert not part & union
        union = union | part
    assert union.is_all
    assert universe.requested.atoms == {atom for atom in universe.atoms if atom.requested}


@pytest.mark.parametrize("requested", [None, frozenset(), frozenset({"text"}), frozenset({"visual", "text"})])
def test_different_sets_have_different_names_that_are_identifiers(requested: frozenset[str] | None) -> None:
    universe = Universe(GROUPS, requested)
    sets = [TokenSet(frozenset(c), universe) for n in range(7) for c in combinations(universe.atoms, n)]
    names = [str(tokens) for tokens in sets]
    assert len(set(names)) == len(sets)
    assert all(name.isidentifier() for name in names)


@pytest.mark.parametrize(
    ("requested", "atoms", "name"),
    [
        (None, [], "none"),
        (None, [("system", True), ("visual", True), ("text", True)], "all"),
        (None, [("system", True), ("text", True)], "system_text"),
        ({"text"}, [("text", True)], "requested"),
        ({"text"}, [("text", False)], "text_other"),
        ({"text"}, [("text", False), ("text", True)], "text"),
        ({"text"}, [("visual", False)], "visual"),
        ({"text", "visual"}, [("text", True)], "text_requested"),
    ],
)
def test_names(requested: set[str] | None, atoms: list[tuple[str, bool]], name: str) -> None:
    universe = Universe(GROUPS, None if requested is None else frozenset(requested))
    assert str(TokenSet(frozenset(Atom(*atom) for atom in atoms), universe)) == name


def test_all_rows_requested_needs_no_flags() -> None:
    assert [atom.requested for atom in Universe(GROUPS).atoms] == [True] * 3
    assert Universe(GROUPS).requested.is_all
    assert len(Universe(GROUPS, frozenset({"text"})).atoms) == 4
    assert not Universe(GROUPS, frozenset()).requested
