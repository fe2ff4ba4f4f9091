"""Sections: a prompt by group instead of by position, so that what a layer keeps is a run of tokens.

A token set of the compiler is a union of atoms. Atoms stand in one fixed order (the sections', and in `text` the
requested last token after the others), so that taking, adding and merging tokens are slices and concatenations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dop_compile.policy.keep import KeepTable, LayerKeep
from dop_compile.policy.operations import MODULES
from dop_compile.policy.policy import Policy
from dop_compile.tokens import Atom, TokenSet, Universe

__all__ = ["LAST", "Section", "SectionLayout", "keep_table", "past_classes", "tier_sections", "universe"]

LAST = "text"
"""The section that ends with the prompt's last token."""


@dataclass(frozen=True)
class Section:
    """A section and the token groups whose tokens it holds."""

    name: str
    groups: tuple[str, ...]


def tier_sections(policies: Iterable[Policy]) -> list[tuple[Section, ...]]:
    """The sections of each policy: `system` and `text` are one where no policy treats them differently."""
    policies = list(policies)
    apart = any(
        policy.keeps("system", layer, module) != policy.keeps("text", layer, module)
        for policy in policies
        for layer in range(policy.num_layers)
        for module in MODULES
    )
    found = []
    for policy in policies:
        visual = [Section(group, (group,)) for group in policy.groups if group not in ("system", "text")]
        if apart:
            found.append((Section("system", ("system",)), *visual, Section(LAST, ("text",))))
        else:
            found.append((*visual, Section(LAST, ("system", "text"))))
    return found


def keep_table(policy: Policy, sections: Sequence[Section]) -> KeepTable:
    """Who takes part where, with sections as groups."""

    def kept(layer: int, module: str) -> frozenset[str]:
        return frozenset(s.name for s in sections if policy.keeps(s.groups[-1], layer, module))

    rows = tuple(LayerKeep(*(kept(layer, module) for module in MODULES)) for layer in range(policy.num_layers))
    return KeepTable(tuple(section.name for section in sections), rows)


def universe(sections: Sequence[Section]) -> Universe:
    """The atoms of a prefill that returns the last token's logits."""
    return Universe(tuple(section.name for section in sections), frozenset({LAST}))


def past_classes(
    policies: Mapping[str, Policy], sections: Mapping[str, Sequence[Section]]
) -> list[tuple[tuple[int, ...], dict[str, tuple[str, ...]]]]:
    """Layers that hold the same sections as each other in every tier, and which those are per tier."""
    tables = {tier: keep_table(policy, sections[tier]) for tier, policy in policies.items()}
    layers = next(iter(policies.values())).num_layers
    classes: dict[tuple[tuple[str, ...], ...], list[int]] = {}
    for layer in range(layers):
        held = tuple(
            tuple(s.name for s in sections[tier] if s.name in table.layers[layer].key_value)
            for tier, table in tables.items()
        )
        classes.setdefault(held, []).append(layer)
    return [(tuple(group), dict(zip(policies, held, strict=True))) for held, group in classes.items()]


class SectionLayout:
    """Where the atoms of one call stand.

    Args:
        universe: the atoms, in the order of the sections.
        lengths: size of each section, which may be symbolic.
    """

    def __init__(self, universe: Universe, lengths: Mapping[str, Any]):
        self.universe = universe
        self._size: dict[Atom, Any] = {}
        for atom in universe.atoms:
            if (
                universe.all_requested
                or universe.requested_groups is None
                or atom.group not in universe.requested_groups
            ):
                self._size[atom] = lengths[atom.group]
            else:
                self._size[atom] = 1 if atom.requested else lengths[atom.group] - 1

    def _atoms(self, tokens: TokenSet) -> list[Atom]:
        return [atom for atom in self.universe.atoms if atom in tokens.atoms]

    def _pieces(self, source: TokenSet, cut: Callable[[Atom], Any]) -> list[tuple[Any, Any, Any]]:
        """Runs of neighbouring atoms of `source` for which `cut` says the same, as (what, start, size)."""
        runs: list[list[Any]] = []
        start: Any = 0
        for atom in self._atoms(source):
            what = cut(atom)
            if runs and runs[-1][0] == what:
                runs[-1][2] = runs[-1][2] + self._size[atom]
            else:
                runs.append([what, start, self._size[atom]])
            start = start + self._size[atom]
        return [(what, begin, size) for what, begin, size in runs]

    def take(self, x: Tensor, tokens: TokenSet, source: TokenSet, dim: int = 1) -> Tensor:
        """The tokens of a set out of a tensor that is laid out as `source` along `dim`."""
        if tokens == source:
            return x
        if not tokens.atoms:  # keys of a layer that has none: kernels want one, and `DecoderCall.mask` hides it
            return x.narrow(dim, 0, 1)
        pieces = self._pieces(source, lambda atom: atom in tokens.atoms)
        return _join([x.narrow(dim, start, size) for wanted, start, size in pieces if wanted], dim)

    def add(self, x: Tensor, update: Tensor, tokens: TokenSet, target: TokenSet) -> Tensor:
        """x (batch, target, hidden) with `update` (batch, tokens, hidden) added to the tokens that it belongs to."""
        parts: list[Tensor] = []
        done: Any = 0
        for written, start, size in self._pieces(target, lambda atom: atom in tokens.atoms):
            part = x.narrow(1, start, size)
            if written:
                part = part + update.narrow(1, done, size)
                done = done + size
            parts.append(part)
        return _join(parts, 1)

    def merge(self, tokens: TokenSet, sources: Sequence[TokenSet], streams: Sequence[Tensor]) -> Tensor:
        """The tokens of a set out of several streams, each laid out as its own set."""

        def source(atom: Atom) -> int:
            return next(number for number, held in enumerate(sources) if atom in held.atoms)

        taken = [
            self.take(streams[number], TokenSet(frozenset(atoms), self.universe), sources[number])
            for number, atoms in _runs(self._atoms(tokens), source)
        ]
        return _join(taken, 1)


def _runs(atoms: Iterable[Atom], key: Callable[[Atom], int]) -> list[tuple[int, list[Atom]]]:
    runs: list[tuple[int, list[Atom]]] = []
    for atom in atoms:
        if runs and runs[-1][0] == key(atom):
            runs[-1][1].append(atom)
        else:
            runs.append((key(atom), [atom]))
    return runs


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
