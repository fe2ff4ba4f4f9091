"""Where the tokens of each set stand in one batch: the run-time half of `dop_compile.tokens`.

The decoder works on *slots*: the (batch, length) grid of the sequence after reduction. A token set is laid out as a
(batch, count) grid of its own, right-aligned per row like a left-padded batch, `count` being the largest row.
Everything is computed on the CPU from one copy of the group codes, so that a prefill costs the accelerator no
synchronisation beyond reading that copy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dop_compile.tokens import Atom, TokenSet, Universe

__all__ = ["NO_TOKEN", "TokenLayout"]

NO_TOKEN = -1
"""Group code of a slot that holds padding."""


class TokenLayout:
    """The slots of one forward call and the index tensors that move tokens between sets.

    Args:
        universe: the atoms of the program that will run.
        codes: (batch, length) int64 on the CPU; index into `universe.groups`, or `NO_TOKEN` for padding.
        requested: (batch, length) bool on the CPU; the rows whose output the caller wants.
        device: where index tensors are needed.
    """

    def __init__(self, universe: Universe, codes: Tensor, requested: Tensor, device: torch.device):
        self.universe = universe
        self.codes = codes
        self.requested = requested
        self.device = device
        self.batch, self.length = codes.shape
        self._memo: dict[Any, Any] = {}

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    @cached_property
    def _atom_codes(self) -> Tensor:
        """(batch, length) index of each slot's atom in `universe.atoms`, `NO_TOKEN` for padding."""
        number = {atom: index for index, atom in enumerate(self.universe.atoms)}
        table = torch.tensor(
            [
                [number.get(Atom(group, flag), number.get(Atom(group, True), 0)) for flag in (False, True)]
                for group in self.universe.groups
            ],
            device="cpu",
        )
        codes = table[self.codes.clamp(min=0), self.requested.long()]
        return torch.where(self.codes == NO_TOKEN, NO_TOKEN, codes)

    def members(self, tokens: TokenSet) -> Tensor:
        """(batch, length) bool: the slots of the set. The full set includes padding, so that it needs no gather."""
        if tokens.is_all:
            return torch.ones_like(self.codes, dtype=torch.bool)
        table = torch.tensor([atom in tokens.atoms for atom in self.universe.atoms] + [False], device="cpu")
        return table[self._atom_codes]

    def slots(self, tokens: TokenSet) -> tuple[Tensor, Tensor]:
        """Slot of each position of the set's grid and whether it holds a token; both (batch, count), on the CPU."""

        def make() -> tuple[Tensor, Tensor]:
            members = self.members(tokens)
            counts = members.sum(dim=1)
            # Never empty: a grid without tokens has one position of padding, so that no shape becomes zero
            count = max(int(counts.max()), 1)
            order = torch.argsort(members.to(torch.int8), dim=1, stable=True)
            valid = torch.arange(count, device="cpu") >= count - counts[:, None]
            return order[:, self.length - count :].contiguous(), valid

        result: tuple[Tensor, Tensor] = self._once(("slots", tokens), make)
        return result

    def count(self, tokens: TokenSet) -> int:
        """Width of the set's grid: the largest number of its tokens in one row."""
        return self.length if tokens.is_all else self.slots(tokens)[0].shape[1]

    def tokens_per_sample(self, tokens: TokenSet) -> list[int]:
        """Number of the set's tokens in each row, padding left out."""
        members = self.members(tokens) & (self.codes != NO_TOKEN)
        counts: list[int] = members.sum(dim=1).tolist()
        return counts

    def assign(self, slots: Tensor, group: str) -> None:
        """Move slots, (batch, length) bool on the CPU, to another group.

        Only sets that hold both groups or neither may have been laid out before.
        """
        self.codes = torch.where(slots, self.universe.groups.index(group), self.codes)
        self.__dict__.pop("_atom_codes", None)

    def positions(self, tokens: TokenSet) -> Tensor:
        """(batch, length) position of each slot inside the set's grid; 0 where it is not a member."""

        def make() -> Tensor:
            slots, valid = self.slots(tokens)
            positions = torch.zeros(self.batch, self.length, dtype=torch.long, device="cpu")
            rows = torch.arange(self.batch, device="cpu")[:, None].expand_as(slots)
            columns = torch.arange(slots.shape[1], device="cpu").expand_as(slots)
            positions[rows[valid], slots[valid]] = columns[valid]
            return positions

        result: Tensor = self._once(("positions", tokens), make)
        return result

    def index(self, kind: str, tokens: TokenSet, others: tuple[TokenSet, ...]) -> Tensor:
        """The index tensor of a graph's `IndexSpec`."""
        if kind == "merge":
            return self.merge_index(tokens, others)
        return (self.gather_index if kind == "gather" else self.scatter_index)(tokens, others[0])

    def gather_index(self, tokens: TokenSet, source: TokenSet) -> Tensor:
        """(batch, count) position in `source`'s grid of each token of the set (any position where there is none)."""

        def make() -> Tensor:
            slots, valid = self.slots(tokens)
            index = self.positions(source).gather(1, slots)
            return torch.where(valid, index, 0).to(self.device)

        result: Tensor = self._once(("gather", tokens, source), make)
        return result

    def scatter_index(self, tokens: TokenSet, target: TokenSet) -> Tensor:
        """(batch, count of target): 1 + flat position in the set's grid of each target token, 0 where not a member."""

        def make() -> Tensor:
            slots, valid = self.slots(tokens)
            count = slots.shape[1]
            index = torch.zeros(self.batch, self.count(target), dtype=torch.long, device="cpu")
            rows = torch.arange(self.batch, device="cpu")[:, None].expand_as(slots)
            flat = 1 + rows * count + torch.arange(count, device="cpu")
            position = self.positions(target).gather(1, slots)
            index[rows[valid], position[valid]] = flat[valid]
            return index.to(self.device)

        result: Tensor = self._once(("scatter", tokens, target), make)
        return result

    def merge_index(self, tokens: TokenSet, sources: tuple[TokenSet, ...]) -> Tensor:
        """(batch, count) position of each token of the set in the concatenated grids of disjoint `sources`."""

        def make() -> Tensor:
            slots, valid = self.slots(tokens)
            index = torch.zeros_like(slots)
            offset = 0
            for source in sources:
                inside = self.members(source).gather(1, slots) & valid
                index = torch.where(inside, offset + self.positions(source).gather(1, slots), index)
                offset += self.count(source)
            return index.to(self.device)

        result: Tensor = self._once(("merge", tokens, sources), make)
        return result

    def device_slots(self, tokens: TokenSet) -> tuple[Tensor, Tensor | None]:
        """`slots` on the device; validity is None where every position holds a token."""

        def make() -> tuple[Tensor, Tensor | None]:
            slots, valid = self.slots(tokens)
            return slots.to(self.device), None if bool(valid.all()) else valid.to(self.device)

        result: tuple[Tensor, Tensor | None] = self._once(("device", tokens), make)
        return result
