"""The best policy for a budget, by enumeration over interpolated divergences (DOP eq. 7).

Spaces:
- "dop": (d_A, d_P, n_v), the paper's; proxy D_A(d_A) + D_P(d_P) + D_v(n_v).
- "split": queries and key-values apart, (d_Q, d_K, d_P, n_v) with d_Q, d_P <= d_K; proxy
  D_A(d_K) + [D_Q(d_Q) - D_Q(d_K)] + [D_P(d_P) - D_P(d_K)] + D_v(n_v).
  Without keys nobody reads a visual token, so that D_A is the curve of the keys, and what is updated at d_K or later is
  dead: it costs FLOPs and changes nothing. Every policy of "dop" is therefore matched by one of "split" that is no
  dearer and whose proxy is no larger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np

from dop_compile.policy import Policy
from dop_compile.policy_json import Provenance, choice, finite, integer
from dop_compile.search.axes import DOP_AXES, SPLIT_AXES, VISUAL_TOKENS
from dop_compile.search.costs import FlopsModel, KvModel
from dop_compile.search.curves import curve
from dop_compile.search.divergences import Divergences

__all__ = ["SPACES", "Candidate", "InfeasibleBudgetError", "candidates", "optimize"]

SPACES = {"dop": DOP_AXES, "split": SPLIT_AXES}
Array = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]
Measure = Callable[[Sequence[Policy]], Sequence[float]]
Cost = Callable[[Ints, Ints, Ints, Ints], Array]


class InfeasibleBudgetError(ValueError):
    """No policy of the space meets the budget; the message says what the least possible is."""


@dataclass(frozen=True)
class Candidate:
    """A policy of a space, its predicted divergence, and its FLOPs as a fraction of the original's."""

    policy: Policy
    divergence: float
    flops: float


@dataclass(frozen=True)
class _Limit:
    """A cost that may not exceed a bound, which people read in units of `scale`.

    `least_tokens` gives the visual tokens that must enter under a bound; None where any number may.
    """

    cost: Cost
    bound: float
    scale: float
    name: str
    least_tokens: Callable[[float], int] | None = None

    def allows(self, space: _Space, n: Ints) -> Flags:
        """Which combinations of depths, with so many visual tokens each, cost no more than the bound."""
        return self.cost(space.query, space.keys, space.mlp, n) <= self.bound * (1 + 1e-12)


class _Space:
    """Every combination of depths, as flat arrays, and the divergence of each but for the visual tokens."""

    def __init__(self, divergences: Divergences, space: str, monotone: bool):
        layers = divergences.num_layers
        both, mlp = (curve(divergences, axis, monotone=monotone) for axis in ("mha_depth", "mlp_depth"))
        self.tokens = curve(divergences, VISUAL_TOKENS, monotone=monotone)
        depths = np.arange(layers + 1)
        if space == "dop":
            self.keys, self.mlp = (grid.ravel() for grid in np.meshgrid(depths, depths, indexing="ij"))
            self.query = self.keys
            self.divergence = both[self.keys] + mlp[self.mlp]
        else:
            query = curve(divergences, "mha_query_depth", monotone=monotone)
            grids = np.meshgrid(depths, depths, depths, indexing="ij")
            inside = (grids[0] <= grids[1]) & (grids[2] <= grids[1])
            self.query, self.keys, self.mlp = (grid[inside] for grid in grids)
            with np.errstate(invalid="ignore"):  # inf - inf, below the lowest measured depths
                updates = np.where(self.query == self.keys, 0.0, query[self.query] - query[self.keys])
                changes = np.where(self.mlp == self.keys, 0.0, mlp[self.mlp] - mlp[self.keys])
            self.divergence = both[self.keys] + updates + changes
        self.divergence = np.where(np.isnan(self.divergence), np.inf, self.divergence)


def _allowed(space: _Space, limits: Sequence[_Limit], n: Ints) -> Flags:
    allowed = np.ones(n.shape, dtype=bool)
    for limit in limits:
        allowed &= limit.allows(space, n)
    return allowed


def _lowest_tokens(limits: Sequence[_Limit], measured: int) -> int:
    """The visual tokens that every limit asks for, and no fewer than were measured."""
    return max([measured, *(limit.least_tokens(limit.bound) for limit in limits if limit.least_tokens)])


def _largest_within(space: _Space, limits: Sequence[_Limit], low: int, full: int) -> Ints:
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


def _alpha(divergences: Divergences, alpha: float | str | None) -> float | None:
    if alpha is None:
        return None
    if isinstance(alpha, str):
        choice("alpha", alpha, ("auto",))
        return default_alpha(divergences.model_type)
    if finite("alpha", alpha) < 0:
        raise ValueError(f"alpha: expected a number >= 0, 'auto' or None, got {alpha}")
    return float(alpha)


def candidates(
    divergences: Divergences,
    budget: float | None = None,
    *,
    max_kv_bytes: float | None = None,
    space: str = "split",
    alpha: float | str | None = "auto",
    monotone: bool = True,
    top: int = 1,
    limits: Sequence[_Limit] = (),
) -> list[Candidate]:
    """The `top` policies of least predicted divergence within all budgets, best first; see `optimize`.

    Each differs from the others in a depth: of one combination of depths the best number of tokens is taken.
    """
    choice("space", space, SPACES)
    top = integer("top", top, low=1)
    for axis in SPACES[space]:
        divergences.array(axis)
    if budget is None and max_kv_bytes is None and not limits:
        raise TypeError("budget: expected at least one of budget, max_kv_bytes and max_ms")
    factor = _alpha(divergences, alpha)
    dims, full = divergences.dims, divergences.visual_tokens
    flops = FlopsModel(dims, divergences.counts, full)
    bounds = list(limits)
    if budget is not None:
        budget = finite("budget", budget)
        if not 0 < budget <= 1:
            raise ValueError(f"budget: expected a fraction of FLOPs kept, 0 < budget <= 1, got {budget}")
        if budget == 1 and len(bounds) == 0 and max_kv_bytes is None:
            return [Candidate(_policy(divergences, None, full, 1.0, 0.0), 0.0, 1.0)]

        def least_tokens(bound: float) -> int:
            return minimal_tokens(flops, dims.num_layers, full, bound / flops.original, factor)

        bounds.append(_Limit(flops, budget * flops.original, flops.original, "budget", least_tokens))
    if max_kv_bytes is not None:
        bytes_ = KvModel(dims, divergences.counts, full, divergences.dtype_bytes)
        bounds.append(_Limit(bytes_, finite("max_kv_bytes", max_kv_bytes), 1.0, "max_kv_bytes"))
    everything = _Space(divergences, space, monotone)
    measured = int(np.isinf(everything.tokens).sum())
    return _best(divergences, everything, bounds, measured, full, flops, budget, top)


def _best(
    divergences: Divergences,
    space: _Space,
    bounds: Sequence[_Limit],
    measured: int,
    full: int,
    flops: FlopsModel,
    budget: float | None,
    top: int,
) -> list[Candidate]:
    low = _lowest_tokens(bounds, measured)
    most = _largest_within(space, bounds, low, full)
    feasible = (most >= low) & np.isfinite(space.divergence)
    if not feasible.any():
        raise InfeasibleBudgetError(_least(space, bounds, measured))
    # Of a non-monotone curve the best number of tokens may be less than the largest
    best_up_to = _running_argmin(space.tokens, low)
    tokens = np.where(feasible, best_up_to[np.clip(most, low, full)], low)
    total = np.where(feasible, space.divergence + space.tokens[tokens], np.inf)
    spent = flops(space.query, space.keys, space.mlp, tokens)
    order = np.lexsort((spent, total))[: min(top, int(feasible.sum()))]  # ties: the cheapest
    return [
        Candidate(
            _policy(
                divergences,
                (int(space.query[i]), int(space.keys[i]), int(space.mlp[i])),
                int(tokens[i]),
                budget,
                float(total[i]),
            ),
            float(total[i]),
            float(spent[i] / flops.original),
        )
        for i in order
    ]


def _running_argmin(values: Array, low: int) -> Ints:
    """Per index n >= low the index from low to n of the least value; the largest such index on ties."""
    found = np.arange(len(values))
    for n in range(low + 1, len(values)):
        found[n] = n if values[n] <= values[found[n - 1]] else found[n - 1]
    return found


def _least(space: _Space, bounds: Sequence[_Limit], measured: int) -> str:
    """Per limit the least that is feasible while the others stay; per limit alone where that does not help."""
    found = [(limit, _least_bound(space, limit, [o for o in bounds if o is not limit], measured)) for limit in bounds]
    if all(least is None for _, least in found):
        found = [(limit, _least_bound(space, limit, [], measured)) for limit in bounds]
    parts = [
        f"{limit.name}: {limit.bound / limit.scale:.4g} asked for, {least / limit.scale:.4g} is the least"
        for limit, least in found
        if least is not None
    ]
    tokens = _lowest_tokens(bounds, measured)
    return f"no policy meets the budget with at least {tokens} visual tokens ({'; '.join(parts)})"


def _least_bound(space: _Space, limit: _Limit, others: Sequence[_Limit], measured: int) -> float | None:
    """The least bound, rounded up to what is printed of it; None where the other limits cannot be met.

    A larger bound may ask for more visual tokens, which cost more: it is raised until it pays for its own.
    """
    while True:
        n = np.full(space.query.shape, _lowest_tokens([limit, *others], measured))
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


def _policy(
    divergences: Divergences, depths: tuple[int, int, int] | None, tokens: int, budget: float | None, divergence: float
) -> Policy:
    layers = divergences.num_layers
    provenance = Provenance(
        model_fingerprint=divergences.model_fingerprint,
        budget=budget,
        divergence=divergence,
        samples=len(divergences.digests),
        versions=divergences.versions,
    )
    base = divergences.base.replace(provenance=provenance)
    if depths is None:
        return base
    query, keys, mlp = depths
    pruned = Policy.depthwise(layers, mha_query_depth=query, mha_key_value_depth=keys, mlp_depth=mlp).pruned
    visual = None if tokens == divergences.visual_tokens else tokens
    return base.replace(pruned=pruned, visual_tokens=visual)


@overload
def optimize(
    divergences: Divergences,
    budget: float | None = None,
    *,
    max_kv_bytes: float | None = ...,
    space: str = ...,
    alpha: float | str | None = ...,
    monotone: bool = ...,
    verify_top: int = ...,
    measure: Measure | None = ...,
) -> Policy: ...
@overload
def optimize(
    divergences: Divergences,
    budget: Sequence[float],
    *,
    max_kv_bytes: float | None = ...,
    space: str = ...,
    alpha: float | str | None = ...,
    monotone: bool = ...,
    verify_top: int = ...,
    measure: Measure | None = ...,
) -> list[Policy]: ...


def optimize(
    divergences: Divergences,
    budget: float | Sequence[float] | None = None,
    *,
    max_kv_bytes: float | None = None,
    space: str = "split",
    alpha: float | str | None = "auto",
    monotone: bool = True,
    verify_top: int = 1,
    measure: Measure | None = None,
) -> Policy | list[Policy]:
    """The policy of least predicted divergence within a budget.

    Args:
        divergences: as `measure_divergences` returns them, or `transfer`.
        budget: fraction of the original's eq. 11 FLOPs at the samples' own token counts, 0 < budget <= 1; several give
            a policy each.
        max_kv_bytes: mean bytes of a sample's keys and values after prefill.
        space: "split", or "dop" for the paper's (d_A, d_P, n_v).
        alpha: at least alpha n_e visual tokens enter (DOP C.4); "auto" is 1.5 for LLaVA and 1.25 for others, None is
            no such bound.
        monotone: see `dop_compile.search.curves`.
        verify_top: how many of the best candidates are measured jointly, of which the best is returned (DOP F.3).
        measure: joint divergence of policies, for `verify_top` (`measure_policies` gives it per sample).

    Raises:
        InfeasibleBudgetError: no policy meets the budget.
        TypeError, ValueError: wrong values; a needed axis was not measured.
    """
    settings: dict[str, Any] = {"max_kv_bytes": max_kv_bytes, "space": space, "alpha": alpha, "monotone": monotone}
    verify_top = integer("verify_top", verify_top, low=1)
    if verify_top > 1 and measure is None:
        raise TypeError("measure: verify_top needs a function that measures policies jointly")

    def one(value: float | None) -> Policy:
        found = candidates(divergences, value, top=verify_top, **settings)
        if measure is None or len(found) == 1:
            return found[0].policy
        policies = [candidate.policy for candidate in found]
        joint = [finite("measure", float(value)) for value in measure(policies)]
        if len(joint) != len(policies):
            raise ValueError(f"measure: expected a divergence for each of {len(policies)} policies, got {len(joint)}")
        best = int(np.argmin(joint))
        source = policies[best].provenance
        assert source is not None
        return policies[best].replace(provenance=Provenance(**{**vars(source), "divergence": joint[best]}))

    if isinstance(budget, Sequence):
        return [one(value) for value in budget]
    return one(budget)
