"""Where the tokens of each set stand in one batch: the run-time half of `dop_compile.tokens`.

The decoder works on *slots*: the (batch, length) grid of the sequence after reduction. A token set is laid out as a
(batch, count) grid of its own, right-aligned per row like a left-padded batch, `count` being the largest row.
Everything is computed on the CPU from one copy of the group codes, by NumPy, whose small operations cost a tenth of
torch's, and goes to the device in one piece.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dop_compile.passes.blocks import IndexSpec
from dop_compile.tokens import Atom, TokenSet, Universe
from dop_compile.transfer import to_device

__all__ = ["NO_TOKEN", "TokenLayout"]

NO_TOKEN = -1
"""Group code of a slot that holds padding."""

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@functools.lru_cache(maxsize=16)
def _kept(
    universe: Universe, shape: tuple[int, int], codes: bytes, requested: bytes, device: torch.device, stream: Any
) -> TokenLayout:
    return TokenLayout(
        universe,
        torch.from_numpy(np.frombuffer(codes, np.int64).reshape(shape).copy()),
        torch.from_numpy(np.frombuffer(requested, np.bool_).reshape(shape).copy()),
        device,
    )


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
        self._there: dict[Any, Any] = {}  # on the device

    @classmethod
    def kept(cls, universe: Universe, codes: Tensor, requested: Tensor, device: torch.device) -> TokenLayout:
        """The layout of such a batch; the same one, index tensors included, if there was one of late.

        Only for batches whose tokens stay in their groups.
        """
        shape = (codes.shape[0], codes.shape[1])
        # Another stream may run ahead of the copy that one has begun
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        return _kept(universe, shape, codes.numpy().tobytes(), requested.numpy().tobytes(), device, stream)

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    @cached_property
    def has_padding(self) -> bool:
        """Whether a slot holds no token."""
        return bool((self.codes.numpy() == NO_TOKEN).any())

    @cached_property
    def _rows(self) -> Ints:
        return np.arange(self.batch)[:, None]

    @cached_property
    def _atom_codes(self) -> Ints:
        """(batch, length) index of each slot's atom in `universe.atoms`, `NO_TOKEN` for padding."""
        number = {atom: index for index, atom in enumerate(self.universe.atoms)}
        flags = [(Atom(group, False), Atom(group, True)) for group in self.universe.groups]
        table = np.array([[number.get(atom, number.get(yes, 0)) for atom in (no, yes)] for no, yes in flags])
        codes = self.codes.numpy()
        return np.where(codes == NO_TOKEN, NO_TOKEN, table[np.maximum(codes, 0), self.requested.numpy().astype(int)])

    def _members(self, tokens: TokenSet) -> Bools:
        if tokens.is_all:
            return np.ones((self.batch, self.length), dtype=bool)
        table = np.array([atom in tokens.atoms for atom in self.universe.atoms] + [False])
        members: Bools = table[self._atom_codes]
        return members

    def _slots(self, tokens: TokenSet) -> tuple[Ints, Bools]:
        def make() -> tuple[Ints, Bools]:
            members = self._members(tokens)
            counts = members.sum(axis=1)
            # Never empty: a grid without tokens has one position of padding, so that no shape becomes zero
            count = max(int(counts.max()), 1)
            order = np.argsort(members, axis=1, kind="stable")
            valid = np.arange(count) >= count - counts[:, None]
            return np.ascontiguousarray(order[:, self.length - count :]), valid

        result: tuple[Ints, Bools] = self._once(("slots", tokens), make)
        return result

    def _positions(self, tokens: TokenSet) -> Ints:
        def make() -> Ints:
            slots, valid = self._slots(tokens)
            positions = np.zeros((self.batch, self.length), dtype=np.int64)
            rows, columns = np.nonzero(valid)
            positions[rows, slots[rows, columns]] = columns
            return positions

        result: Ints = self._once(("positions", tokens), make)
        return result

    def members(self, tokens: TokenSet) -> Tensor:
        """(batch, length) bool: the slots of the set. The full set includes padding, so that it needs no gather."""
        return torch.from_numpy(self._members(tokens))

    def slots(self, tokens: TokenSet) -> tuple[Tensor, Tensor]:
        """Slot of each position of the set's grid and whether it holds a token; both (batch, count), on the CPU."""
        slots, valid = self._slots(tokens)
        return torch.from_numpy(slots), torch.from_numpy(valid)

    def count(self, tokens: TokenSet) -> int:
        """Width of the set's grid: the largest number of its tokens in one row."""
        return self.length if tokens.is_all else self._slots(tokens)[0].shape[1]

    def tokens_per_sample(self, tokens: TokenSet) -> list[int]:
        """Number of the set's tokens in each row, padding left out."""
        members = self._members(tokens) & (self.codes.numpy() != NO_TOKEN)
        counts: list[int] = members.sum(axis=1).tolist()
        return counts

    def assign(self, slots: Tensor, group: str) -> None:
        """Move slots, (batch, length) bool on the CPU, to another group.

        Only sets that hold both groups or neither may have been laid out before.
        """
        self.codes = torch.where(slots, self.universe.groups.index(group), self.codes)
        self.__dict__.pop("_atom_codes", None)

    def positions(self, tokens: TokenSet) -> Tensor:
        """(batch, length) position of each slot inside the set's grid; 0 where it is not a member."""
        return torch.from_numpy(self._positions(tokens))

    # --- on the device --------------------------------------------------------------------------------------------

    def send(self, specs: Sequence[IndexSpec], grids: Sequence[TokenSet]) -> None:
        """Bring what will be asked for to the device at once: `index` of some, `device_slots` of others."""
        specs = [spec for spec in specs if spec not in self._there]
        grids = [tokens for tokens in grids if tokens not in self._there]
        arrays: list[NDArray[Any]] = [self._index(spec.kind, spec.tokens, spec.others) for spec in specs]
        for tokens in grids:
            arrays.extend(self._slots(tokens))
        sent = iter(to_device(arrays, self.device) if arrays else ())
        for spec in specs:
            self._there[spec] = next(sent)
        for tokens in grids:
            slots, valid = next(sent), next(sent)
            self._there[tokens] = slots, None if self._slots(tokens)[1].all() else valid

    def index(self, kind: str, tokens: TokenSet, others: tuple[TokenSet, ...]) -> Tensor:
        """The index tensor of a graph's `IndexSpec`.

        1. gather: (batch, count) position in the grid of `others[0]` of each token of the set, any where there is none.
        2. scatter: (batch, count of `others[0]`) 1 + flat position in the set's grid of each token, 0 of no member.
        3. merge: (batch, count) position of each token in the concatenated grids of disjoint `others`.
        """
        spec = IndexSpec(kind, tokens, others)
        if spec not in self._there:
            self.send([spec], ())
        result: Tensor = self._there[spec]
        return result

    def device_slots(self, tokens: TokenSet) -> tuple[Tensor, Tensor | None]:
        """`slots` on the device; validity is None where every position holds a token."""
        if tokens not in self._there:
            self.send((), [tokens])
        result: tuple[Tensor, Tensor | None] = self._there[tokens]
        return result

    def device_members(self, tokens: TokenSet, among: TokenSet) -> Tensor:
        """(batch, count) bool, on the device: which positions of the grid of `among` hold a token of the set."""
        key = ("members", tokens, among)
        if key not in self._there:
            slots, valid = self._slots(among)
            (self._there[key],) = to_device([self._members(tokens)[self._rows, slots] & valid], self.device)
        result: Tensor = self._there[key]
        return result

    def _index(self, kind: str, tokens: TokenSet, others: tuple[TokenSet, ...]) -> Ints:
        if kind == "merge":
            return self._merge_index(tokens, others)
        return (self._gather_index if kind == "gather" else self._scatter_index)(tokens, others[0])

    def _gather_index(self, tokens: TokenSet, source: TokenSet) -> Ints:
        slots, valid = self._slots(tokens)
        return np.where(valid, self._positions(source)[self._rows, slots], 0)

    def _scatter_index(self, tokens: TokenSet, target: TokenSet) -> Ints:
        slots, valid = self._slots(tokens)
        index = np.zeros((self.batch, self.count(target)), dtype=np.int64)
        rows, columns = np.nonzero(valid)
        index[rows, self._positions(target)[rows, slots[rows, columns]]] = 1 + rows * slots.shape[1] + columns
        return index

    def _merge_index(self, tokens: TokenSet, sources: tuple[TokenSet, ...]) -> Ints:
        slots, valid = self._slots(tokens)
        index = np.zeros_like(slots)
        offset = 0
        for source in sources:
            inside = self._members(source)[self._rows, slots] & valid
            index = np.where(inside, offset + self._positions(source)[self._rows, slots], index)
            offset += self.count(source)
        return index
