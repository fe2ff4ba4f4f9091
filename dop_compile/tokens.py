"""Sets of tokens, as the compiler sees them before any token exists.

A prompt's tokens are partitioned into *atoms*: a token group (``system``, ``visual``, ...) crossed with whether the
caller asked for the token's output row. Everything a pass decides - who is a query, who a key, who stays in the
residual stream - is a union of atoms, so set algebra at compile time is exact for every batch at run time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

__all__ = ["Atom", "TokenSet", "Universe"]


class Atom(NamedTuple):
    """Tokens of one group whose output row is requested, or is not."""

    group: str
    requested: bool


@dataclass(frozen=True)
class Universe:
    """All atoms of one program.

    Args:
        groups: token groups, in sequence order.
        requested_groups: groups of which some rows are requested; None where every row of every group is.
    """

    groups: tuple[str, ...]
    requested_groups: frozenset[str] | None = None

    @property
    def all_requested(self) -> bool:
        return self.requested_groups is None

    @cached_property
    def atoms(self) -> tuple[Atom, ...]:
        if self.requested_groups is None:
            return tuple(Atom(group, True) for group in self.groups)
        flags = {group: (False, True) if group in self.requested_groups else (False,) for group in self.groups}
        return tuple(Atom(group, flag) for group in self.groups for flag in flags[group])

    @property
    def all(self) -> TokenSet:
        return TokenSet(frozenset(self.atoms), self)

    @property
    def none(self) -> TokenSet:
        return TokenSet(frozenset(), self)

    @property
    def requested(self) -> TokenSet:
        return TokenSet(frozenset(atom for atom in self.atoms if atom.requested), self)

    def groups_set(self, groups: Iterable[str]) -> TokenSet:
        wanted = set(groups)
        return TokenSet(frozenset(atom for atom in self.atoms if atom.group in wanted), self)


@dataclass(frozen=True)
class TokenSet:
    """A union of atoms of one universe."""

    atoms: frozenset[Atom]
    universe: Universe

    @cached_property
    def _hash(self) -> int:
        return hash((self.atoms, self.universe))

    def __hash__(self) -> int:  # sets are keys that each layer of each call looks up
        return self._hash

    def __or__(self, other: TokenSet) -> TokenSet:
        return TokenSet(self.atoms | other.atoms, self.universe)

    def __and__(self, other: TokenSet) -> TokenSet:
        return TokenSet(self.atoms & other.atoms, self.universe)

    def __sub__(self, other: TokenSet) -> TokenSet:
        return TokenSet(self.atoms - other.atoms, self.universe)

    def __le__(self, other: TokenSet) -> bool:
        return self.atoms <= other.atoms

    def __bool__(self) -> bool:
        return bool(self.atoms)

    @cached_property
    def is_all(self) -> bool:
        return len(self.atoms) == len(self.universe.atoms)

    def __str__(self) -> str:
        """A readable name that is also a valid identifier: ``all``, ``none``, ``system_text``, ``text_requested``."""
        if self.is_all:
            return "all"
        if not self.atoms:
            return "none"
        if not self.universe.all_requested and self == self.universe.requested:
            return "requested"
        parts = []
        for group in self.universe.groups:
            flags = {atom.requested for atom in self.atoms if atom.group == group}
            if flags == {True}:
                parts.append(group if self.universe.all_requested else f"{group}_requested")
            elif flags == {False}:
                partly = group in (self.universe.requested_groups or ())
                parts.append(f"{group}_other" if partly else group)
            elif flags:
                parts.append(group)
        return "_".join(parts)

    __repr__ = __str__
