"""Budgets as bounds on costs: what fits, how many visual tokens must enter, and what the least budget is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dop_compile.checks import choice, finite
from dop_compile.search.costs import FlopsModel
from dop_compile.search.divergences import Divergences
from dop_compile.search.space import Space

__all__ = [
    "InfeasibleBudgetError",
    "Limit",
    "alpha_of",
    "default_alpha",
    "describe_least",
    "largest_within",
    "lowest_tokens",
    "minimal_tokens",
]

Array = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]
Cost = Callable[[Ints, Ints, Ints, Ints], Array]


class InfeasibleBudgetError(ValueError):
    """No policy of the space meets the budget; the message says what the least possible is."""


@dataclass(frozen=True)
class Limit:
    """A cost that may not exceed a bound, which people read in units of `scale`.

    `least_tokens` gives the visual tokens that must enter under a bound; None where any number may.
    """

    cost: Cost
    bound: float
    scale: float
    name: str
    least_tokens: Callable[[float], int] | None = None

    def allows(self, space: Space, n: Ints) -> Flags:
        """Which combinations of depths, with so many visual tokens each, cost no more than the bound."""
        return self.cost(space.query, space.keys, space.mlp, n) <= self.bound * (1 + 1e-12)


def _allowed(space: Space, limits: Sequence[Limit], n: Ints) -> Flags:
    allowed = np.ones(n.shape, dtype=bool)
    for limit in limits:
        allowed &= limit.allows(space, n)
    return allowed


def lowest_tokens(limits: Sequence[Limit], measured: int) -> int:
    """The visual tokens that every limit asks for, and no fewer than were measured."""
    return max([measured, *(limit.least_tokens(limit.bound) for limit in limits if limit.least_tokens)])


def largest_within(space: Space, limits: Sequence[Limit], low: int, full: int) -> Ints:
    """Per combination of depths the most visual tokens that every limit allows; low - 1 where none does.

    Every cost grows with the tokens, so that this is a bisection, for all combinations at once.
    """
    most = np.full(space.query.shape, low - 1)
    least_above = np.full(space.query.shape, full + 1)
    while (open_ := least_above - most > 1).any():
        middle = np.where(open_, (most + least_above) // 2, np.maximum(most, 0))
        allowed = _allowed(space, limits, np.clip(middle, 0, full))
        most = np.where(open_ & allowed, middle, most)
        least_above = np.where(open_ & ~allowed, middle, least_above)
    return most


def minimal_tokens(flops: FlopsModel, layers: int, full: int, budget: float, alpha: float | None) -> int:
    """n_min = alpha n_e, at most all; n_e visual tokens in every layer cost closest to the budget (DOP C.4)."""
    if alpha is None:
        return 0
    every = np.full(full + 1, layers)
    cost = flops(every, every, every, np.arange(full + 1))
    n_e = int(np.abs(cost - budget * flops.original).argmin())
    return min(full, round(alpha * n_e))


def default_alpha(model_type: str) -> float:
    """1.5 for LLaVA's family and 1.25 for others, as in DOP C.4."""
    return 1.5 if "llava" in model_type else 1.25


def alpha_of(divergences: Divergences, alpha: float | str | None) -> float | None:
    """The factor of n_min; None for none."""
    if alpha is None:
        return None
    if isinstance(alpha, str):
        choice("alpha", alpha, ("auto",))
        return default_alpha(divergences.model_type)
    if finite("alpha", alpha) < 0:
        raise ValueError(f"alpha: expected a number >= 0, 'auto' or None, got {alpha}")
    return float(alpha)


def describe_least(space: Space, bounds: Sequence[Limit], measured: int) -> str:
    """Per limit the least that is feasible while the others stay; per limit alone where that does not help."""
    found = [(limit, _least_bound(space, limit, [o for o in bounds if o is not limit], measured)) for limit in bounds]
    if all(least is None for _, least in found):
        found = [(limit, _least_bound(space, limit, [], measured)) for limit in bounds]
    parts = [
        f"{limit.name}: {limit.bound / limit.scale:.4g} asked for, {least / limit.scale:.4g} is the least"
        for limit, least in found
        if least is not None
    ]
    tokens = lowest_tokens(bounds, measured)
    return f"no policy meets the budget with at least {tokens} visual tokens ({'; '.join(parts)})"


def _least_bound(space: Space, limit: Limit, others: Sequence[Limit], measured: int) -> float | None:
    """The least bound, rounded up to what is printed of it; None where the other limits cannot be met.

    A larger bound may ask for more visual tokens, which cost more: it is raised until it pays for its own.
    """
    while True:
        n = np.full(space.query.shape, lowest_tokens([limit, *others], measured))
        allowed = np.isfinite(space.divergence) & _allowed(space, others, n)
        if not allowed.any():
            return None
        if (allowed & limit.allows(space, n)).any():
            return limit.bound
        least = float(limit.cost(space.query, space.keys, space.mlp, n)[allowed].min())
        limit = replace(limit, bound=_rounded_up(least / limit.scale) * limit.scale)


def _rounded_up(value: float) -> float:
    """To four digits."""
    if value <= 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return math.ceil(value / unit - 1e-10) * unit
