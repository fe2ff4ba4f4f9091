"""The token whose nearest neighbour is farthest away, without the distance of every token to every other.

One block of tokens after the other is compared with those that may still be it: those whose nearest neighbour so far is
farther than that of the best token of which all is known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dop_compile.reducers.cosines import Cosines, product
from dop_compile.reducers.numbers import order_keys

__all__ = ["most_isolated"]

BLOCK, COMPLETED, ROWS = 512, 8, 2048
"""Tokens that are compared with at a time, the most promising tokens of which each time all is found out, and the
tokens of one matrix product."""


def most_isolated(cosines: Cosines, narrow: Tensor) -> int:
    """The token of the largest distance 1 - cosine to its nearest neighbour; ties: the lowest index.

    Args:
        narrow: (tokens, dim) `cosines.narrow_units` of all.
    """
    tokens = cosines.tokens
    open_ = _without_twins(narrow)
    if not len(open_):  # all have an equal, at no distance
        return 0
    highest, complete = (
        torch.full((tokens,), -torch.inf, device="cpu"),
        torch.zeros(tokens, dtype=torch.bool, device="cpu"),
    )
    # In an order that has nothing to do with the picture, so that few columns tell much about every token
    order = torch.randperm(tokens, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    everything = torch.arange(tokens, device="cpu")
    slack = 2 * cosines.error + 2.0**-21

    def compare(rows: Tensor, columns: Tensor, units: Tensor) -> Tensor:
        """(rows,) the highest similarity to one of the columns."""
        result = torch.empty(len(rows), device="cpu")
        for some, into in zip(rows.split(ROWS), result.split(ROWS), strict=True):
            found = product(narrow[some], units).masked_fill_(some[:, None] == columns, -torch.inf)
            torch.amax(found, dim=1, out=into)
        return result

    for first in range(0, tokens, BLOCK):
        columns = order[first : first + BLOCK]
        highest[open_] = torch.maximum(highest[open_], compare(open_, columns, narrow[columns]))
        undecided = open_[~complete[open_]]
        if not len(undecided):
            break
        promising = undecided[highest[undecided].topk(min(COMPLETED, len(undecided)), largest=False).indices]
        highest[promising] = compare(promising, everything, narrow)
        complete[promising] = True
        limit = float(highest[complete].amin())
        open_ = open_[highest[open_] <= limit + slack]
    nearest = torch.full((len(open_),), -torch.inf, device="cpu")
    for columns in everything.split(BLOCK):
        units = cosines.units(columns)
        for rows, into in zip(open_.split(BLOCK), nearest.split(BLOCK), strict=True):
            found = cosines.with_units(rows, units).masked_fill_(rows[:, None] == columns, -torch.inf)
            torch.maximum(into, found.amax(dim=1), out=into)
    best = order_keys(1 - nearest, open_).argmax()
    return int(open_[best]) if tokens == 1 or float(nearest[best]) < 1 else 0


def _without_twins(narrow: Tensor) -> Tensor:
    """Tokens without an equal one; of tokens of zeros, which have a distance to all, the first."""
    direction = torch.randn(narrow.shape[1], generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    order = (narrow @ direction).argsort(stable=True)
    twins = torch.zeros(len(narrow), dtype=torch.bool, device="cpu")
    for part in torch.arange(1, len(order), device="cpu").split(BLOCK):
        same = (narrow[order[part]] == narrow[order[part - 1]]).all(dim=1)
        twins[order[part[same]]] = twins[order[part[same] - 1]] = True
    zeros = ~narrow.any(dim=1)
    first = zeros & (zeros.cumsum(dim=0) == 1)
    return (~(twins | zeros) | first).nonzero()[:, 0]
