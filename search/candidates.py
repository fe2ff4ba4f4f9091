"""The policies of least predicted divergence within a budget, by enumeration over measured curves (DOP eq. 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dop_compile.checks import choice, finite, integer
from dop_compile.policy.policy import Policy
from dop_compile.policy.provenance import Provenance
from dop_compile.search.axes import VISUAL_TOKENS
from dop_compile.search.costs import FlopsModel, KvModel
from dop_compile.search.divergences import Divergences
from dop_compile.search.latency import LatencyModel
from dop_compile.search.limits import (
    InfeasibleBudgetError,
    Limit,
    alpha_of,
    describe_least,
    largest_within,
    lowest_tokens,
    minimal_tokens,
)
from dop_compile.search.space import SPACES, Space

__all__ = ["SPACES", "Candidate", "InfeasibleBudgetError", "candidates", "tokens_only"]

Array = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Candidate:
    """A policy of a space, its predicted divergence, and its FLOPs as a fraction of the original's."""

    policy: Policy
    divergence: float
    flops: float


def candidates(
    divergences: Divergences,
    budget: float | None = None,
    *,
    max_kv_bytes: float | None = None,
    max_ms: float | None = None,
    latency: LatencyModel | None = None,
    space: str = "split",
    alpha: float | str | None = "auto",
    monotone: bool = True,
    top: int = 1,
) -> list[Candidate]:
    """The `top` policies of least predicted divergence within all budgets, best first; arguments as of `optimize`.

    Each differs from the others in a depth: of one combination of depths the best number of tokens is taken.
    """
    choice("space", space, SPACES)
    top = integer("top", top, low=1)
    for axis in SPACES[space]:
        divergences.array(axis)
    everything = Space(divergences, space, monotone)
    return _within(divergences, everything, budget, max_kv_bytes, max_ms, latency, alpha, top)


def tokens_only(
    divergences: Divergences,
    budget: float | None = None,
    *,
    max_kv_bytes: float | None = None,
    max_ms: float | None = None,
    latency: LatencyModel | None = None,
    monotone: bool = True,
) -> Candidate | None:
    """What the reducer alone does within all budgets: no operation pruned, the best number of visual tokens.

    The bound alpha n_e of DOP C.4 is none here: n_e tokens cost the whole budget. None where no number of tokens that
    was measured meets it.
    """
    divergences.array(VISUAL_TOKENS)
    alone = Space.of_tokens_alone(divergences, monotone)
    try:
        return _within(divergences, alone, budget, max_kv_bytes, max_ms, latency, None, 1)[0]
    except InfeasibleBudgetError:
        return None


def _within(
    divergences: Divergences,
    space: Space,
    budget: float | None,
    max_kv_bytes: float | None,
    max_ms: float | None,
    latency: LatencyModel | None,
    alpha: float | str | None,
    top: int,
) -> list[Candidate]:
    if budget is None and max_kv_bytes is None and max_ms is None:
        raise TypeError("budget: expected at least one of budget, max_kv_bytes and max_ms")
    factor = alpha_of(divergences, alpha)
    dims, full = divergences.dims, divergences.visual_tokens
    flops = FlopsModel(dims, divergences.counts, full)
    bounds: list[Limit] = []
    if budget is not None:
        budget = finite("budget", budget)
        if not 0 < budget <= 1:
            raise ValueError(f"budget: expected a fraction of FLOPs kept, 0 < budget <= 1, got {budget}")
        if budget == 1 and max_ms is None and max_kv_bytes is None:
            return [Candidate(_policy(divergences, None, full, 1.0, 0.0), 0.0, 1.0)]

        def least_tokens(bound: float) -> int:
            return minimal_tokens(flops, dims.num_layers, full, bound / flops.original, factor)

        bounds.append(Limit(flops, budget * flops.original, flops.original, "budget", least_tokens))
    if max_kv_bytes is not None:
        bytes_ = KvModel(dims, divergences.counts, full, divergences.dtype_bytes)
        bounds.append(Limit(bytes_, finite("max_kv_bytes", max_kv_bytes), 1.0, "max_kv_bytes"))
    if max_ms is not None:
        bounds.append(Limit(_latency(latency, divergences), finite("max_ms", max_ms), 1.0, "max_ms"))
    measured = int(np.isinf(space.tokens).sum())
    return _best(divergences, space, bounds, measured, full, flops, budget, top)


def _latency(latency: LatencyModel | None, divergences: Divergences) -> LatencyModel:
    if latency is None:
        raise TypeError("latency: max_ms needs a LatencyModel, as measure_latency returns it")
    if latency.num_layers != divergences.num_layers:
        raise ValueError(
            f"latency: measured on a model of {latency.num_layers} layers, the divergences are of "
            f"{divergences.num_layers}"
        )
    if latency.model_fingerprint not in ("", divergences.model_fingerprint):
        raise ValueError(
            f"latency: measured on another model (fingerprint {latency.model_fingerprint[:12]}, the divergences are of "
            f"{divergences.model_fingerprint[:12]}); measure that of this one"
        )
    return latency


def _best(
    divergences: Divergences,
    space: Space,
    bounds: Sequence[Limit],
    measured: int,
    full: int,
    flops: FlopsModel,
    budget: float | None,
    top: int,
) -> list[Candidate]:
    low = lowest_tokens(bounds, measured)
    most = largest_within(space, bounds, low, full)
    feasible = (most >= low) & np.isfinite(space.divergence)
    if not feasible.any():
        raise InfeasibleBudgetError(describe_least(space, bounds, measured))
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
