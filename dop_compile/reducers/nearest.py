"""The most similar token of some tokens, out of sets that change: lists of near ones instead of a similarity of all.

Every pair is compared once, by `Cosines` near products, and each token keeps a list of those most similar to it. Exact
cosines are computed for the first of a list, and for more where these have left the set. An entry counts once its
cosine is no lower than any that can be behind it; where a list has no such entry in the set, all of it is looked at.

The lists are on the CPU, wherever the features are, and in NumPy, whose calls cost a fraction of PyTorch's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dop_compile.reducers.cosines import Cosines, product
from dop_compile.reducers.numbers import LARGE, NUMBERS, order_keys

__all__ = ["NearestTokens"]

Array = np.ndarray[Any, Any]
WIDTH, EXPECTED, SAMPLE = 96, 80, 2048
"""Entries of a list, how many it has on average at first, and the tokens by which its limit is found."""
STEPS, STEP_NUMBERS = (32, 16), 1 << 14
"""Entries of which the exact cosine is computed at a time (they divide a list), as many as read no more numbers."""
ROWS = 512
"""Of a block of similarities that are looked through at a time."""
CROWDED = 0.8
"""Where fewer of the tokens that a search looks at are left, the others are forgotten."""
SINGLY, FEW = 8, 64
"""Entries that are tried one by one, as most tokens find theirs among the first; those of few tokens, all at once."""


class NearestTokens:
    """Lists of the tokens (n,) of a part, ascending; from here on a token is its place in them.

    Args:
        cosines: of the part.
        tokens: (n,) int64 on the CPU.
    """

    def __init__(self, cosines: Cosines, tokens: Tensor):
        self._cosines, self._tokens = cosines, tokens.numpy()
        self._step = next((step for step in STEPS if step * cosines.dim <= STEP_NUMBERS), STEPS[-1])
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
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        first, limits = 0, torch.empty(0)
        while first < count:
            height = SAMPLE if not first else max(1, NUMBERS // count)
            own = product(self._units[first : first + height], self._units[first:])
            own += self._noise[2 * first :].as_strided(own.shape, (1, 1))
            own.diagonal().fill_(-torch.inf)
            if not first:
                limits = _limits(own)
            for start in range(0, len(own), ROWS):
                found += _above(own[start : start + ROWS], limits, first, start, len(own))
            first += len(own)
        one, other, values = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
        self._fill(limits.cpu().numpy(), one, shuffled[other], values)
        self._extend(places)

    def _fill(self, limits: Array, one: Array, near: Array, value: Array) -> None:
        """Lists of the members: the entries (near, value) of the member numbered `one`, above its limit."""
        keys = order_keys(torch.from_numpy(value), torch.zeros(1, dtype=torch.long)).numpy() >> 32
        order = ((one << 33) - keys).argsort()
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
        at = self._known[places, None] + np.arange(self._step)
        there = at < filled
        row, column = there.nonzero()
        other = np.where(there, np.take_along_axis(near, np.minimum(at, WIDTH - 1), 1), places[:, None])
        exact = self._cosines.pairs(torch.from_numpy(self._tokens[places]), torch.from_numpy(self._tokens[other]))
        value[row, at[row, column]] = exact.numpy()[row, column]
        known = np.minimum(self._known[places, None] + self._step, filled)
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
        rows, first = places[at], SINGLY if len(at) > FEW else 0
        for shown, sure in zip(self._shown[:first], self._sure[:first], strict=True):
            hit = inside.take(shown.take(rows))
            found, rest = np.flatnonzero(hit), np.flatnonzero(~hit)
            result[at.take(found)] = sure.take(rows.take(found))
            at, rows = at.take(rest), rows.take(rest)
        hit = inside[self._shown[first:, rows]]
        found, rest = np.flatnonzero(hit.any(axis=0)), np.flatnonzero(~hit.any(axis=0))
        result[at[found]] = self._sure[first + hit.argmax(axis=0)[found], rows[found]]
        return at[rest]

    def _search(self, places: Array, inside: Array, left: Array) -> Array:
        """`highest`, by a look at the whole set; these places get new lists of what is `left` (tokens + 1,)."""
        device, found = self._units.device, []
        staying = left[self._members]
        if staying.mean() < CROWDED:
            self._units = self._units[torch.from_numpy(staying).to(device)]
            self._members = self._members[staying]
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


def _limits(own: Tensor) -> Tensor:
    """(members,) what about `EXPECTED` of all others exceed, told from the similarities (sample, members) of some."""
    sample, count = own.shape
    if count <= WIDTH:
        return torch.full((count,), -torch.inf, device=own.device)
    wanted = max(1, round(EXPECTED * sample / count))
    # The largest of each few rows will do: of two among them that count, one is missed, and the limit is a bit lower
    few = max(1, min(16, sample // (8 * wanted)))
    own = own[: sample // few * few].view(-1, few, count).amax(dim=1)
    limits = torch.empty(count, device=own.device)
    for part, into in zip(own.split(LARGE, dim=1), limits.split(LARGE), strict=True):
        into.copy_(part.T.contiguous().topk(wanted).values[:, -1])
    return limits


def _above(own: Tensor, limits: Tensor, first: int, start: int, height: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Entries (member, other, similarity) that exceed the members' limits.

    Args:
        own: (rows, columns) similarities of the members from `first + start` with all from `first`.
        height: of the block: its first columns are its rows.
    """
    here = limits[first + start : first + start + len(own), None]
    row, column = (own > torch.minimum(here, limits[first:])).nonzero().T
    value = own[row, column]
    row = row + start
    mine, others = value > limits[first + row], (value > limits[first + column]) & (column >= height)
    pairs = ((mine, row, column), (others, column, row))
    return [(first + one[mask], first + other[mask], value[mask]) for mask, one, other in pairs]
