"""Greedy choices that look again only at tokens that may come next.

What a token would add can only sink as others are chosen, so what was found before is an upper bound. Of all tokens,
the best by their bounds are brought up to date, and are chosen one after the other while the best of them beats the
bounds of all others. The order of choice is that of the plain definition, ties included. On the CPU, since which tokens
these are is decided in Python.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dop_compile.reducers.cosines import Cosines, product
from dop_compile.reducers.isolated import most_isolated
from dop_compile.reducers.numbers import order_keys

__all__ = ["farthest_points_lazily", "greedy_map_lazily"]

POOL, BLOCK, GROUP = 1024, 128, 256
"""Tokens whose bounds are lowered together, tokens that are brought up to date, and tokens of one matrix product."""
LOWEST = -(1 << 62)


class _Gains(Protocol):
    """What each token would add: bounds (tokens,) float32, -inf for chosen ones; never below 0 otherwise."""

    bounds: Tensor

    def lower(self, pool: Tensor, block: int) -> bool:
        """Lower the bounds of a pool's tokens as cheaply as many can be; False if its first `block` have been."""
        ...

    def enter(self, block: Tensor) -> None:
        """Bring the block's bounds up to date; from now on they are kept so."""
        ...

    def take(self, place: int) -> Tensor:
        """Choose the block's token at a place. Returns the block's bounds after it."""
        ...

    def leave(self) -> None:
        """Write the block's numbers back."""
        ...


def _choose(gains: _Gains, chosen: list[int], count: int) -> Tensor:
    """Go on choosing until there are `count`."""
    while len(chosen) < count:
        keys = order_keys(gains.bounds)
        best = keys.topk(min(POOL, len(keys))).indices
        if gains.lower(best, BLOCK):
            continue
        block = best[:BLOCK]
        outside = int(keys[best[BLOCK]]) if len(best) > BLOCK else LOWEST
        gains.enter(block)
        bounds = gains.bounds[block]
        while len(chosen) < count:
            own = order_keys(bounds, block)
            place = int(own.argmax())
            if int(own[place]) < outside:
                break
            if float(bounds[place]) <= 0:  # so are all others
                left = torch.ones(len(keys), dtype=torch.bool, device="cpu")
                left[chosen] = False
                chosen += left.nonzero()[: count - len(chosen), 0].tolist()
                return torch.tensor(chosen, dtype=torch.long, device="cpu")
            chosen.append(int(block[place]))
            bounds = gains.take(place)
        gains.leave()
    return torch.tensor(chosen, dtype=torch.long, device="cpu")


def farthest_points_lazily(features: Tensor, count: int) -> Tensor:
    """`greedy.farthest_points` for the distance 1 - cosine of features (tokens, dim) on the CPU: (count,) int64."""
    if count == 0:
        return torch.empty(0, dtype=torch.long, device="cpu")
    cosines = Cosines(features)
    narrow = cosines.narrow_units(torch.arange(cosines.tokens, device="cpu"))
    first = most_isolated(cosines, narrow)
    return _choose(_Distances(cosines, narrow, first, count), [first], count)


class _Distances:
    """Distances to the nearest chosen token: the cheap bound is the near cosines', plus their error."""

    def __init__(self, cosines: Cosines, narrow: Tensor, first: int, count: int):
        self._cosines, self._narrow = cosines, narrow
        self._margin = 1 + cosines.error + 2.0**-22
        self.bounds = torch.full((cosines.tokens,), torch.inf, device="cpu")
        self._seen_near, self._seen = torch.zeros(2, cosines.tokens, dtype=torch.long, device="cpu")
        self._near = narrow.new_empty(count, cosines.dim)
        self._exact = cosines.units(slice(0, 1)).new_empty(count, cosines.dim)
        self._block = self._units = self._own = torch.empty(0, device="cpu")
        self._number = 0
        self._add(first, cosines.units(slice(first, first + 1))[0])

    def _add(self, token: int, unit: Tensor) -> None:
        self._near[self._number] = self._narrow[token]
        self._exact[self._number] = unit
        self.bounds[token] = -torch.inf
        self._number += 1

    def lower(self, pool: Tensor, block: int) -> bool:
        number = self._number
        if not bool((self._seen_near[pool[:block]] < number).any()):
            return False
        for part, first in _stale(pool, self._seen_near, number):
            found = self._margin - product(self._narrow[part], self._near[first:number]).amax(dim=1)
            self.bounds[part] = torch.minimum(self.bounds[part], found)
        return True

    def enter(self, block: Tensor) -> None:
        for part, first in _stale(block, self._seen, self._number):
            found = 1 - self._cosines.with_units(part, self._exact[first : self._number]).amax(dim=1)
            self.bounds[part] = torch.minimum(self.bounds[part], found)
        self._block, self._units, self._own = block, self._cosines.units(block), self.bounds[block]

    def take(self, place: int) -> Tensor:
        unit = self._units[place]
        self._add(int(self._block[place]), unit)
        self._own = torch.minimum(self._own, 1 - torch.nan_to_num((self._units @ unit).float()))
        self._own[place] = -torch.inf
        return self._own

    def leave(self) -> None:
        self.bounds[self._block] = self._own
        self._seen_near[self._block] = self._seen[self._block] = self._number


def greedy_map_lazily(features: Tensor, quality: Tensor, count: int, explained: float) -> Tensor:
    """`greedy.greedy_map` for the cosines of features (tokens, dim) on the CPU: (count,) int64."""
    return _choose(_Variances(Cosines(features), quality.double(), count, explained), [], count)


class _Variances:
    """What the chosen tokens leave of each token's variance, by the rows of the kernel's Cholesky factor.

    A token's row has a number for each chosen one that it was compared with; rows of tokens that are never looked at
    stay untouched memory.
    """

    def __init__(self, cosines: Cosines, quality: Tensor, count: int, explained: float):
        self._cosines, self._quality = cosines, quality
        self._whole = quality.square() * cosines.own()
        self._least = explained * self._whole
        self._factor = quality.new_empty(cosines.tokens, count)
        self._chosen_factor = quality.new_zeros(count, count)
        self._chosen_units = quality.new_empty(count, cosines.dim)
        self._chosen_quality = quality.new_empty(count)
        self._seen = torch.zeros(cosines.tokens, dtype=torch.long, device="cpu")
        self._variance = self._kept(self._whole, self._least)
        self.bounds = self._variance.float()
        self._block = self._units = self._rows = torch.empty(0, device="cpu")
        self._number = 0

    @staticmethod
    def _kept(variance: Tensor, least: Tensor) -> Tensor:
        return torch.where((variance > least) | variance.isneginf(), variance, 0.0)

    def lower(self, pool: Tensor, block: int) -> bool:
        number = self._number
        if not bool((self._seen[pool[:block]] < number).any()):
            return False
        for part, first in _stale(pool, self._seen, number):
            row = self._cosines.with_units(part, self._chosen_units[first:number]).double()
            row = row * self._quality[part][:, None] * self._chosen_quality[first:number]
            row -= self._factor[part, :first] @ self._chosen_factor[first:number, :first].T
            corner = self._chosen_factor[first:number, first:number]
            self._factor[part, first:number] = torch.linalg.solve_triangular(corner, row.T, upper=False).T
            left = self._whole[part] - self._factor[part, :number].square().sum(dim=1)
            self._variance[part] = self._kept(left, self._least[part])
        self.bounds[pool] = self._variance[pool].float()
        return True

    def enter(self, block: Tensor) -> None:
        self._block, self._units, self._rows = block, self._cosines.units(block), self._factor[block]

    def take(self, place: int) -> Tensor:
        number, token, rows = self._number, int(self._block[place]), self._rows
        root = self._variance[token].sqrt()
        quality = self._quality[token]
        row = torch.nan_to_num((self._units @ self._units[place]).float()) * self._quality[self._block] * quality
        update = (row - rows[:, :number] @ rows[place, :number]) / root
        update[place] = root
        rows[:, number] = update
        self._chosen_factor[number, : number + 1] = rows[place, : number + 1]
        self._chosen_units[number], self._chosen_quality[number] = self._units[place], quality
        variance = self._variance[self._block] - update.square()
        variance[place] = -torch.inf
        self._variance[self._block] = self._kept(variance, self._least[self._block])
        self._number += 1
        return self._variance[self._block].float()

    def leave(self) -> None:
        self._factor[self._block, : self._number] = self._rows[:, : self._number]
        self.bounds[self._block] = self._variance[self._block].float()
        self._seen[self._block] = self._number


def _stale(tokens: Tensor, seen: Tensor, number: int) -> list[tuple[Tensor, int]]:
    """Groups of the tokens that have seen fewer than `number` chosen ones, and how many the group has seen at least.

    They are marked as having seen all.
    """
    behind = tokens[seen[tokens] < number]
    behind = behind[seen[behind].argsort()]
    groups = [(part, int(seen[part[0]])) for part in behind.split(GROUP) if len(part)]
    seen[behind] = number
    return groups
