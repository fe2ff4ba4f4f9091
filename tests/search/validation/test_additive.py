"""The studies of the additive proxy against plain enumerations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from dop_compile import Policy, prefill_flops
from dop_compile.search import Divergences, InfeasibleBudgetError, optimize
from dop_compile.search.validation import joint_grid, rank_correlation
from tests.search.synthetic import dims_of, divergences_of, make_divergences

LAYERS, VISUAL = 5, 24


def given() -> Divergences:
    """Three points an axis, samples that differ, no ties."""
    rng = np.random.default_rng(5)
    points: dict[str, Sequence[int | float]] = {
        "mha_depth": (4, 2, 1),
        "mlp_depth": (3, 1, 0),
        "visual_tokens": (0.75, 0.5, 0.0),
    }
    values = {axis: np.sort(rng.uniform(0, 2, (3, 2)), axis=0).tolist() for axis in points}
    return divergences_of(points, values, [(2, VISUAL, 3), (2, VISUAL, 5)], dims_of(LAYERS))


def depths(policy: Policy) -> tuple[int, int, int]:
    """(d_A, d_P, n_v) of a depth-wise policy."""
    both, keys, mlp = (
        LAYERS - len(policy.pruned_layers("visual", module)) for module in ("mha_query", "mha_key_value", "mlp")
    )
    assert both == keys
    assert policy == Policy.depthwise(LAYERS, mha_depth=both, mlp_depth=mlp, visual_tokens=policy.visual_tokens)
    return both, mlp, VISUAL if policy.visual_tokens is None else policy.visual_tokens


def joint(policy: Policy) -> float:
    """Some loss that is not additive."""
    both, mlp, tokens = depths(policy)
    return float(np.sin(7 * both + 3 * mlp) + 0.1 * (VISUAL - tokens) + 2)


def test_the_rank_correlation_is_that_of_the_papers_formula() -> None:
    divergences = given()
    study = rank_correlation(divergences, lambda policies: [joint(p) for p in policies])
    expected = []
    for (i, both), (j, mlp), (k, part) in itertools.product(*map(enumerate, divergences.points.values())):
        parts = [divergences.values[axis][n] for axis, n in zip(divergences.points, (i, j, k), strict=True)]
        policy = Policy.depthwise(LAYERS, mha_depth=both, mlp_depth=mlp, visual_tokens=round(part * VISUAL))
        expected.append((both, mlp, round(part * VISUAL), sum(sum(row) / 2 for row in parts), joint(policy)))
    assert [row[:3] for row in study.rows] == [row[:3] for row in expected]
    assert np.allclose([row[3:5] for row in study.rows], [row[3:] for row in expected])
    ranks = [{value: 1 + place for place, value in enumerate(sorted(row[n] for row in expected))} for n in (3, 4)]
    assert len(ranks[0]) == len(ranks[1]) == 27, "no ties"
    apart = sum((ranks[0][row[3]] - ranks[1][row[4]]) ** 2 for row in expected)
    assert f"rho {1 - 6 * apart / (27 * (27**2 - 1)):.3f}" in study.title


def test_an_additive_loss_correlates_fully_and_its_opposite_not_at_all() -> None:
    divergences = given()
    first = rank_correlation(divergences, lambda policies: [joint(p) for p in policies])
    additive = {row[:3]: row[3] for row in first.rows}
    same = rank_correlation(divergences, lambda policies: [[additive[depths(p)]] * 2 for p in policies])
    assert "rho 1.000" in same.title
    assert same.column("additive rank") == same.column("joint rank")
    opposite = rank_correlation(divergences, lambda policies: [-additive[depths(p)] for p in policies])
    assert "rho -1.000" in opposite.title


@pytest.mark.parametrize("budget", [0.9, 0.5])
def test_the_grid_holds_every_policy_within_the_budget(budget: float) -> None:
    divergences = given()
    seen: list[Policy] = []

    def measure(policies: Sequence[Policy]) -> list[float]:
        seen.extend(policies)
        return [joint(p) for p in policies]

    study = joint_grid(divergences, measure, budget, depth_step=2, token_step=4, alpha=1.25)

    def flops(policy: Policy) -> float:
        return sum(prefill_flops(divergences.dims, policy, *counts) for counts in divergences.counts)

    whole = flops(Policy.full(LAYERS))
    n_e = min(
        range(VISUAL + 1), key=lambda n: abs(flops(Policy.full(LAYERS).replace(visual_tokens=n)) - budget * whole)
    )
    least = min(VISUAL, round(1.25 * n_e))
    inside = {}
    for both, mlp, tokens in itertools.product((1, 3, 5), (1, 3, 5), range(0, VISUAL + 1, 4)):
        policy = Policy.depthwise(
            LAYERS, mha_depth=both, mlp_depth=mlp, visual_tokens=None if tokens == VISUAL else tokens
        )
        if flops(policy) <= budget * whole and tokens >= least:
            inside[both, mlp, tokens] = joint(policy)
    assert [depths(policy) for policy in seen[:-1]] == list(inside)
    best = min(inside, key=lambda each: inside[each])
    rows = {row[0]: row[1:] for row in study.rows}
    assert rows["joint optimum of the grid"][:3] == best
    assert rows["joint optimum of the grid"][4:] == (inside[best], 1)
    additive = optimize(divergences, budget, space="dop", alpha=1.25)
    assert rows["additive optimum"][:3] == depths(additive.replace(provenance=None))
    value = joint(additive.replace(provenance=None))
    assert rows["additive optimum"][4:] == (value, 1 + sum(other < value for other in inside.values()))
    cheapest = min(row[4] for row in study.rows if "grid" in str(row[0]))
    assert rows["additive optimum of the grid"][3] == cheapest


def test_a_grid_without_a_policy_says_so() -> None:
    with pytest.raises(InfeasibleBudgetError, match="smaller steps"):
        joint_grid(given(), lambda policies: [0.0] * len(policies), 0.2)


@pytest.mark.parametrize(("change", "message"), [({"budget": 0}, "budget"), ({"depth_step": 0}, "depth_step")])
def test_wrong_settings_are_named(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        joint_grid(given(), lambda policies: [0.0] * len(policies), **{"budget": 0.5, **change})


def test_an_axis_that_was_not_measured_is_named() -> None:
    full = make_divergences(4, 8)
    some = divergences_of({"mlp_depth": (1,)}, {"mlp_depth": [[1.0] * 3]}, full.counts, full.dims)
    with pytest.raises(ValueError, match="mha_depth"):
        rank_correlation(some, lambda policies: [0.0] * len(policies))
