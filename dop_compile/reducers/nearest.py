"""The most similar token of some tokens, out of sets that change: lists of near ones instead of a similarity of all.

Every pair is compared once, by `Cosines` near products, and each token keeps a list of those most similar to it. Exact
cosines are computed for the first of a list, and for more where these have left the set. An entry counts once its
cosine is no lower than any that can be behind it; where a list has no such entry in the set, the whole set is looked at.

The lists are on the CPU, wherever the features are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dop_compile.reducers.cosines import Cosines, product
from dop_compile.reducers.numbers import LARGE, NUMBERS, order_keys

__all__ = ["NearestTokens"]

WIDTH, EXPECTED, EXACT = 64, 56, 8
"""Entries of a list, how many it has on average at first, and of how many the exact cosine is computed at a time."""
PROBED = (0, 4, 16, WIDTH)
"""Most tokens find theirs among the first entries."""


class NearestTokens:
    """Lists of the tokens (n,) of a part, ascending; from here on a token is its place in them.

    Args:
        cosines: of the part.
        tokens: (n,) int64 on the CPU.
    """

    def __init__(self, cosines: Cosines, tokens: Tensor):
        self._cosines, self._tokens = cosines, tokens
        count = len(tokens)
        self._near = torch.empty(count, WIDTH, dtype=torch.long, device="cpu")
        self._shown = torch.full_like(self._near, count)  # a place in no set
        self._value = torch.empty(count, WIDTH, device="cpu")
        self._filled, self._known = torch.zeros(2, count, dtype=torch.long, device="cpu")
        self._beyond = torch.empty(count, device="cpu")
        self._numbers = torch.arange(WIDTH, device="cpu")
        self.rebuild(torch.arange(count, device="cpu"))

    def rebuild(self, places: Tensor) -> None:
        """Make the lists of these places anew, and of no others: the rest has left for good."""
        # In an order that has nothing to do with the picture: the first rows tell how many are above a limit
        shuffled = places[torch.randperm(len(places), generator=torch.Generator("cpu").manual_seed(0), device="cpu")]
        self._members = shuffled
        self._units = self._cosines.narrow_units(self._tokens[shuffled])
        count, device = len(places), self._units.device
        rows = max(1, min(count, NUMBERS // count))
        # Equal tokens would be in the same few lists, all of which would be empty at once, if nothing told them apart
        noise = torch.rand(2 * count, generator=torch.Generator("cpu").manual_seed(1), device="cpu")
        self._noise = noise = (noise * self._cosines.error).to(device)

        def block(first: int, start: int) -> Tensor:
            """Similarities of `rows` members from `first` to all from `start`."""
            own = product(self._units[first : first + rows], self._units[start:])
            own += noise[first + start :].as_strided(own.shape, (1, 1))
            own.diagonal(first - start).fill_(-torch.inf)
            return own

        limits = self._limits(block, count)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for first in range(0, count, rows):
            own = block(first, first)
            height = len(own)
            least = torch.minimum(limits[first : first + height, None], limits[first:])
            row, column = (own > least).nonzero(as_tuple=True)
            value = own[row, column]
            here = value > limits[first + row]
            there = (value > limits[first + column]) & (column >= height)
            for mask, one, other in ((here, row, column), (there, column, row)):
                found.append((first + one[mask], first + other[mask], value[mask]))
        one, other, value = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
        self._fill(shuffled, limits.cpu(), one, shuffled[other], value)
        self._extend(places)

    def _limits(self, block: Callable[[int, int], Tensor], count: int) -> Tensor:
        """(members,) what about `EXPECTED` others of each exceed, told from the first of them."""
        if count <= WIDTH:
            return torch.full((count,), -torch.inf, device=self._units.device)
        own = block(0, 0)[:LARGE]
        wanted = max(1, round(EXPECTED * len(own) / count))
        parts = [part.T.contiguous().topk(wanted, dim=1).values[:, -1] for part in own.split(LARGE, dim=1)]
        return torch.cat(parts)

    def _fill(self, places: Tensor, limits: Tensor, one: Tensor, near: Tensor, value: Tensor) -> None:
        """Lists of `places` (n,): the entries (near, value) of the place numbered `one`, above its limit."""
        order = order_keys(value, torch.zeros_like(one))
        order = ((one << 33) - (order >> 32)).argsort()
        one, near, value = one[order], near[order], value[order]
        counts = torch.bincount(one, minlength=len(places))
        rank = torch.arange(len(one), device="cpu") - (counts.cumsum(0) - counts)[one]
        fits = rank < WIDTH
        self._near[places[one[fits]], rank[fits]] = near[fits]
        self._value[places[one[fits]], rank[fits]] = value[fits]
        self._filled[places] = counts.clamp(max=WIDTH)
        self._known[places] = 0
        self._beyond[places] = limits
        more = rank == WIDTH
        self._beyond[places[one[more]]] = value[more]

    def _extend(self, places: Tensor) -> None:
        """Compute the exact cosines of the next entries of these lists."""
        near, value, known = self._near[places], self._value[places], self._known[places, None]
        filled = self._filled[places, None]
        at = known + self._numbers[:EXACT]
        inside = at < filled
        at = at.clamp(max=WIDTH - 1)
        other = torch.where(inside, near.gather(1, at), places[:, None])
        exact = self._cosines.pairs(self._tokens[places], self._tokens[other])
        value.scatter_(1, at, torch.where(inside, exact, value.gather(1, at)))
        known = torch.minimum(known + EXACT, filled)
        exactly = self._numbers < known
        order = torch.where(exactly, value, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        near, value = near.gather(1, order), value.gather(1, order)
        following = value.gather(1, known.clamp(max=WIDTH - 1))[:, 0]
        following = torch.where(known[:, 0] < filled[:, 0], following, self._beyond[places])
        sure = exactly & (value >= (following + self._cosines.error)[:, None])
        self._near[places], self._value[places], self._known[places] = near, value, known[:, 0]
        self._shown[places] = torch.where(sure, near, len(self._tokens))

    def highest(self, places: Tensor, inside: Tensor) -> Tensor:
        """(n,) float32 highest exact cosine of each place to one of a set.

        Args:
            inside: (tokens + 1,) bool, the set: not empty, none of `places`, the last one false.
        """
        result = torch.empty(len(places), device="cpu")
        open_ = torch.arange(len(places), device="cpu")
        left = None
        while len(open_):
            for first, last in zip(PROBED, PROBED[1:], strict=False):
                rows = places[open_]
                hit = inside[self._shown[rows, first:last]]
                found = hit.any(dim=1)
                column = first + hit.to(torch.int8).argmax(dim=1)
                result[open_[found]] = self._value[rows[found], column[found]]
                open_ = open_[~found]
                if not len(open_):
                    return result
            rows = places[open_]
            used_up = self._known[rows] == self._filled[rows]
            if used_up.any():
                if left is None:
                    left = inside.clone()
                    left[places] = True
                result[open_[used_up]] = self._search(rows[used_up], inside, left)
                open_ = open_[~used_up]
            if len(open_):
                self._extend(places[open_])
        return result

    def _search(self, places: Tensor, inside: Tensor, left: Tensor) -> Tensor:
        """`highest`, by a look at the whole set; these places get new lists of the tokens `left` (tokens + 1,)."""
        members, device, found = self._members, self._units.device, []
        there, here = inside[members].to(device), left[members].to(device)
        for some in places.split(max(1, NUMBERS // len(members))):
            own = product(self._cosines.narrow_units(self._tokens[some]), self._units)
            within = own.masked_fill(~there, -torch.inf)
            close = within >= within.amax(dim=1, keepdim=True) - 2 * self._cosines.error
            row, column = (part.cpu() for part in close.nonzero(as_tuple=True))
            exact = self._cosines.pairs(self._tokens[some[row]], self._tokens[members[column]][:, None])[:, 0]
            found.append(torch.full((len(some),), -torch.inf, device="cpu").scatter_reduce(0, row, exact, "amax"))
            own.masked_fill_(~here | (some.to(device)[:, None] == members.to(device)), -torch.inf)
            own += self._noise[: own.shape[1]]
            value, column = (part.cpu() for part in own.topk(min(WIDTH + 1, own.shape[1]), dim=1))
            width = min(WIDTH, value.shape[1])
            self._near[some, :width], self._value[some, :width] = members[column[:, :width]], value[:, :width]
            self._filled[some] = (value[:, :width] > -torch.inf).sum(dim=1)
            self._known[some] = 0
            self._beyond[some] = value[:, WIDTH] if value.shape[1] > WIDTH else -torch.inf
            self._shown[some] = len(self._tokens)
        return torch.cat(found)
