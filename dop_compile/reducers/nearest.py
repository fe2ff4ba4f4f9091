"""The most similar token of some tokens, out of sets that change: lists of near ones instead of a similarity of all.

Every pair is compared once, by `Cosines` near products, and each token keeps a list of those most similar to it. Exact
cosines are computed for the first of a list, and for more where these have left the set. An entry counts once its
cosine is no lower than any that can be behind it; where a list has no such entry in the set, the whole set is looked at.

The lists are on the CPU, wherever the features are, and in NumPy, whose calls cost a fraction of PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dop_compile.reducers.cosines import Cosines, product
from dop_compile.reducers.numbers import LARGE, NUMBERS

__all__ = ["NearestTokens"]

Array = np.ndarray[Any, Any]
WIDTH, EXPECTED, EXACT = 64, 56, 8
"""Entries of a list, how many it has on average at first, and of how many the exact cosine is computed at a time."""
SINGLY = 8
"""Entries that are tried one after the other; most tokens find theirs among the first."""


class NearestTokens:
    """Lists of the tokens (n,) of a part, ascending; from here on a token is its place in them.

    Args:
        cosines: of the part.
        tokens: (n,) int64 on the CPU.
    """

    def __init__(self, cosines: Cosines, tokens: Tensor):
        self._cosines, self._tokens = cosines, tokens.numpy()
        count = len(tokens)
        self._near = np.zeros((count, WIDTH), dtype=np.int32)
        self._value = np.zeros((count, WIDTH), dtype=np.float32)
        self._filled, self._known = np.zeros((2, count), dtype=np.int64)
        self._beyond = np.zeros(count, dtype=np.float32)
        # What counts of each list, an entry of all tokens after the other; `count` is a place in no set
        self._shown = np.full((WIDTH, count), count, dtype=np.int32)
        self._sure = np.zeros((WIDTH, count), dtype=np.float32)
        self.rebuild(np.arange(count))

    # Lists.

    def rebuild(self, places: Array) -> None:
        """Make the lists of these places anew, and of no others: the rest has left for good."""
        # In an order that has nothing to do with the picture: the first rows tell how many are above a limit
        generator = np.random.default_rng(0)
        self._members = shuffled = generator.permutation(places)
        self._units = self._cosines.narrow_units(torch.from_numpy(self._tokens[shuffled]))
        count, device = len(places), self._units.device
        # Equal tokens would be in the same few lists, all of which would be empty at once, if nothing told them apart
        noise = torch.from_numpy(generator.random(2 * count, dtype=np.float32) * np.float32(self._cosines.error))
        self._noise = noise.to(device)
        rows = max(1, min(count, NUMBERS // count))

        def block(first: int, start: int, height: int) -> Tensor:
            """Similarities of `height` members from `first` to all from `start`."""
            own = product(self._units[first : first + height], self._units[start:])
            own += self._noise[first + start :].as_strided(own.shape, (1, 1))
            own.diagonal(first - start).fill_(-torch.inf)
            return own

        limits = self._limits(block, count)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for first in range(0, count, rows):
            own = block(first, first, rows)
            height = len(own)
            row, column = (own > torch.minimum(limits[first : first + height, None], limits[first:])).nonzero().T
            value = own[row, column]
            here = value > limits[first + row]
            there = (value > limits[first + column]) & (column >= height)
            for mask, one, other in ((here, row, column), (there, column, row)):
                found.append((first + one[mask], first + other[mask], value[mask]))
        one, other, values = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
        self._fill(limits.cpu().numpy(), one, shuffled[other], values)
        self._extend(places)

    @staticmethod
    def _limits(block: Callable[[int, int, int], Tensor], count: int) -> Tensor:
        """(members,) what about `EXPECTED` others of each exceed, told from the first of them."""
        own = block(0, 0, min(count, LARGE))
        if count <= WIDTH:
            return torch.full((count,), -torch.inf, device=own.device)
        wanted = max(1, round(EXPECTED * len(own) / count))
        return torch.cat([part.T.contiguous().topk(wanted).values[:, -1] for part in own.split(LARGE, dim=1)])

    def _fill(self, limits: Array, one: Array, near: Array, value: Array) -> None:
        """Lists of the members: the entries (near, value) of the member numbered `one`, above its limit."""
        order = np.lexsort((-value, one))
        one, near, value = one[order], near[order], value[order]
        places, counts = self._members, np.bincount(one, minlength=len(limits))
        rank = np.arange(len(one)) - (counts.cumsum() - counts)[one]
        fits, more = rank < WIDTH, rank == WIDTH
        self._near[places[one[fits]], rank[fits]] = near[fits]
        self._value[places[one[fits]], rank[fits]] = value[fits]
        self._beyond[places] = limits
        self._beyond[places[one[more]]] = value[more]
        self._filled[places], self._known[places] = np.minimum(counts, WIDTH), 0

    def _extend(self, places: Array) -> None:
        """Compute the exact cosines of the next entries of these lists."""
        near, value, filled = self._near[places], self._value[places], self._filled[places, None]
        at = self._known[places, None] + np.arange(EXACT)
        there = at < filled
        row, column = there.nonzero()
        other = np.where(there, np.take_along_axis(near, np.minimum(at, WIDTH - 1), 1), places[:, None])
        exact = self._cosines.pairs(torch.from_numpy(self._tokens[places]), torch.from_numpy(self._tokens[other]))
        value[row, at[row, column]] = exact.numpy()[row, column]
        known = np.minimum(self._known[places, None] + EXACT, filled)
        exactly = np.arange(WIDTH) < known
        order = np.where(exactly, -value, np.inf).argsort(axis=1, kind="stable")
        near, value = np.take_along_axis(near, order, 1), np.take_along_axis(value, order, 1)
        following = np.take_along_axis(value, np.minimum(known, WIDTH - 1), 1)
        following = np.where(known < filled, following, self._beyond[places, None])
        sure = exactly & (value >= following + np.float32(self._cosines.error))
        self._near[places], self._value[places], self._known[places] = near, value, known[:, 0]
        self._shown[:, places] = np.where(sure, near, len(self._tokens)).T
        self._sure[:, places] = value.T

    # Questions.

    def highest(self, places: Array, inside: Array) -> Array:
        """(n,) float32 highest exact cosine of each place (n,) to one of a set.

        Args:
            inside: (tokens + 1,) bool, the set: not empty, none of `places`, the last one false.
        """
        result, at = np.empty(len(places), dtype=np.float32), np.arange(len(places))
        left: Array | None = None
        while len(at):
            at = self._look_up(places, inside, at, result)
            used_up = self._known[places[at]] == self._filled[places[at]]
            if used_up.any():
                if left is None:
                    left = inside.copy()
                    left[places] = True
                result[at[used_up]] = self._search(places[at[used_up]], inside, left)
                at = at[~used_up]
            if len(at):
                self._extend(places[at])
        return result

    def _look_up(self, places: Array, inside: Array, at: Array, result: Array) -> Array:
        """Write the results that the lists tell; which of `at` are left."""
        rows = places[at]
        for shown, sure in zip(self._shown[:SINGLY], self._sure[:SINGLY], strict=True):
            hit = inside.take(shown.take(rows))
            found, rest = np.flatnonzero(hit), np.flatnonzero(~hit)
            result[at.take(found)] = sure.take(rows.take(found))
            at, rows = at.take(rest), rows.take(rest)
        hit = inside[self._shown[SINGLY:, rows]]
        found, rest = np.flatnonzero(hit.any(axis=0)), np.flatnonzero(~hit.any(axis=0))
        result[at[found]] = self._sure[SINGLY + hit.argmax(axis=0)[found], rows[found]]
        return at[rest]

    def _search(self, places: Array, inside: Array, left: Array) -> Array:
        """`highest`, by a look at the whole set; these places get new lists of what is `left` (tokens + 1,)."""
        device, found = self._units.device, []
        members = torch.from_numpy(self._members).to(device)
        there, here = (torch.from_numpy(mask[self._members]).to(device) for mask in (inside, left))
        for first in range(0, len(places), max(1, NUMBERS // len(members))):
            some = places[first : first + max(1, NUMBERS // len(members))]
            own = product(self._cosines.narrow_units(torch.from_numpy(self._tokens[some])), self._units)
            within = own.masked_fill(~there, -torch.inf)
            close = within >= within.amax(dim=1, keepdim=True) - 2 * self._cosines.error
            row, column = close.nonzero().T.cpu().numpy()
            pair = self._tokens[some[row]], self._tokens[self._members[column]][:, None]
            exact = self._cosines.pairs(*map(torch.from_numpy, pair)).numpy()[:, 0]
            best = np.full(len(some), -np.inf, dtype=np.float32)
            np.maximum.at(best, row, exact)
            found.append(best)
            own.masked_fill_(~here | (torch.from_numpy(some).to(device)[:, None] == members), -torch.inf)
            own += self._noise[: len(members)]
            value, number = (part.cpu().numpy() for part in own.topk(min(WIDTH + 1, len(members))))
            width = min(WIDTH, value.shape[1])
            self._near[some, :width], self._value[some, :width] = self._members[number[:, :width]], value[:, :width]
            self._filled[some], self._known[some] = (value[:, :width] > -np.inf).sum(axis=1), 0
            self._beyond[some] = value[:, WIDTH] if value.shape[1] > WIDTH else -np.inf
            self._shown[:, some] = len(self._tokens)
        return np.concatenate(found)
