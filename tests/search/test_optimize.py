"""Optimisation against an exhaustive search in plain Python over the same curves, and the laws of budgets."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dop_compile import Policy
from dop_compile.hf.dimensions import DecoderDims
from dop_compile.policy.costs import kv_cache_bytes, policy_tokens, prefill_flops, prefill_flops_ratio
from dop_compile.search import Divergences, InfeasibleBudgetError, candidates, optimize
from dop_compile.search.axes import DOP_AXES, SPLIT_AXES, default_points
from dop_compile.search.curves import curve
from tests.drawing import examples
from tests.search.synthetic import dims_of, divergences_of, random_divergences

SPACES = ("dop", "split")
BUDGETS = st.floats(0.02, 1)
Place = tuple[int, int, int]


# --- the oracle: every policy, one by one


def policy_at(layers: int, place: Place, tokens: int) -> Policy:
    query, keys, mlp = place
    return Policy.depthwise(
        layers, mha_query_depth=query, mha_key_value_depth=keys, mlp_depth=mlp, visual_tokens=tokens
    )


def spent_share(divergences: Divergences, policy: Policy) -> float:
    full = Policy.full(divergences.num_layers)
    spent = [prefill_flops(divergences.dims, policy, *sample) for sample in divergences.counts]
    whole = [prefill_flops(divergences.dims, full, *sample) for sample in divergences.counts]
    return sum(spent) / sum(whole)


def stored_bytes(divergences: Divergences, policy: Policy) -> float:
    per_sample = [
        kv_cache_bytes(divergences.dims, policy_tokens(policy, *sample), divergences.dtype_bytes)
        for sample in divergences.counts
    ]
    return sum(per_sample) / len(per_sample)


def least_tokens(divergences: Divergences, budget: float, alpha: float | None) -> int:
    """alpha n_e, where n_e visual tokens in every operation cost closest to the budget (DOP C.4)."""
    if alpha is None:
        return 0
    layers, full = divergences.num_layers, divergences.visual_tokens
    shares = [spent_share(divergences, policy_at(layers, (layers,) * 3, n)) for n in range(full + 1)]
    nearest = min(range(full + 1), key=lambda n: abs(shares[n] - budget))
    return min(full, round(alpha * nearest))


def proxy(curves: dict[str, list[float]], space: str, place: Place) -> float:
    query, keys, mlp = place
    total = curves["mha_depth"][keys]
    if space == "dop":
        return total + curves["mlp_depth"][mlp]
    for name, depth in (("mha_query_depth", query), ("mlp_depth", mlp)):
        if depth < keys:  # equal depths are one and the same policy, whether its own value is known or not
            total += curves[name][depth] - curves[name][keys]
    return math.inf if math.isnan(total) else total


def places_of(space: str, layers: int) -> list[Place]:
    depths = range(layers + 1)
    if space == "dop":
        return [(d, d, mlp) for d, mlp in itertools.product(depths, depths)]
    return [(q, k, m) for q, k, m in itertools.product(depths, repeat=3) if q <= k and m <= k]


def exhaustive(
    divergences: Divergences,
    budget: float | None,
    space: str,
    *,
    alpha: float | None,
    monotone: bool,
    max_kv_bytes: float | None = None,
) -> list[float]:
    """The least predicted divergence of every combination of depths that has a feasible policy, ascending."""
    layers, full = divergences.num_layers, divergences.visual_tokens
    axes = DOP_AXES if space == "dop" else SPLIT_AXES
    curves = {axis: curve(divergences, axis, monotone=monotone).tolist() for axis in axes}
    low = 0 if budget is None else least_tokens(divergences, budget, alpha)
    found = []
    for place in places_of(space, layers):
        best = math.inf
        for tokens in range(low, full + 1):
            policy = policy_at(layers, place, tokens)
            if budget is not None and spent_share(divergences, policy) > budget * (1 + 1e-11):
                break  # more tokens cost more
            if max_kv_bytes is not None and stored_bytes(divergences, policy) > max_kv_bytes * (1 + 1e-11):
                break
            best = min(best, proxy(curves, space, place) + curves["visual_tokens"][tokens])
        if math.isfinite(best):
            found.append(best)
    return sorted(found)


def check_against_exhaustive(divergences: Divergences, budget: float | None, space: str, **options: Any) -> None:
    expected = exhaustive(divergences, budget, space, **options)
    if not expected:
        with pytest.raises(InfeasibleBudgetError):
            candidates(divergences, budget, space=space, **options)
        return
    curves = {a: curve(divergences, a, monotone=options["monotone"]).tolist() for a in divergences.points}
    top = min(5, len(expected))
    found = candidates(divergences, budget, space=space, top=top, **options)
    assert [candidate.divergence for candidate in found] == pytest.approx(expected[:top], rel=1e-9, abs=1e-9)
    seen = set()
    for candidate in found:
        policy, layers = candidate.policy, divergences.num_layers
        depths = [layers - len(policy.pruned_layers("visual", m)) for m in ("mha_query", "mha_key_value", "mlp")]
        place, tokens = (depths[0], depths[1], depths[2]), policy.visual_tokens
        # What is predicted and reported is what the policy itself has
        predicted = proxy(curves, space, place)
        predicted += curves["visual_tokens"][divergences.visual_tokens if tokens is None else tokens]
        assert candidate.divergence == pytest.approx(predicted, rel=1e-9, abs=1e-9)
        assert candidate.flops == pytest.approx(spent_share(divergences, policy), rel=1e-9)
        seen.add(place)
    assert len(seen) == len(found)


@examples(40)
@given(
    random_divergences(max_layers=3, max_tokens=5, low=-1),
    BUDGETS,
    st.sampled_from(SPACES),
    st.sampled_from([None, 0.5, 1.25, 1.5]),
    st.booleans(),
)
def test_candidates_are_the_best_of_all_policies(
    divergences: Divergences, budget: float, space: str, alpha: float | None, monotone: bool
) -> None:
    assume(budget < 1)
    check_against_exhaustive(divergences, budget, space, alpha=alpha, monotone=monotone)


@examples(25)
@given(
    random_divergences(max_layers=3, max_tokens=5),
    st.none() | BUDGETS,
    st.floats(0.05, 1.2),
    st.sampled_from(SPACES),
    st.booleans(),
)
def test_candidates_meet_both_budgets(
    divergences: Divergences, budget: float | None, share: float, space: str, monotone: bool
) -> None:
    limit = share * stored_bytes(divergences, Policy.full(divergences.num_layers))
    check_against_exhaustive(divergences, budget, space, alpha=None, monotone=monotone, max_kv_bytes=limit)


def test_top_is_all_there_is_where_there_is_less() -> None:
    given_curves = fixed()
    every = exhaustive(given_curves, 0.5, "dop", alpha=None, monotone=True)
    assert len(candidates(given_curves, 0.5, space="dop", alpha=None, top=10**6)) == len(every)


# --- fixed curves


def fixed(layers: int = 4, visual: int = 12, **changes: Any) -> Divergences:
    """Two samples; deeper and more is better everywhere, and keys matter most."""
    depths = tuple(range(layers - 1, -1, -1))

    def rows(scale: float) -> list[list[float]]:
        return [[scale * (layers - d) ** 2, scale * (layers - d)] for d in depths]

    return divergences_of(
        {"mha_depth": depths, "mlp_depth": depths, "mha_query_depth": depths, "visual_tokens": (0.75, 0.5, 0.25, 0.0)},
        {
            "mha_depth": rows(0.5),
            "mlp_depth": rows(0.1),
            "mha_query_depth": rows(0.05),
            "visual_tokens": [[0.1, 0.2], [0.4, 0.5], [1.0, 2.0], [4.0, 5.0]],
        },
        [(2, visual, 3), (2, visual - 4, 5)],
        dims_of(layers),
        **changes,
    )


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("alpha", ["auto", None])
def test_a_budget_of_one_is_the_full_policy(space: str, alpha: str | None) -> None:
    policy = optimize(fixed(), 1, space=space, alpha=alpha)
    assert policy.is_full
    assert policy.provenance is not None
    assert (policy.provenance.budget, policy.provenance.divergence) == (1.0, 0.0)
    (only,) = candidates(fixed(), 1.0, space=space, top=9)
    assert (only.policy, only.divergence, only.flops) == (optimize(fixed(), 1.0, space=space), 0.0, 1.0)


def test_with_room_for_everything_nothing_is_pruned() -> None:
    everything = stored_bytes(fixed(), Policy.full(4))
    for policy in (optimize(fixed(), max_kv_bytes=everything), optimize(fixed(), 1, max_kv_bytes=2 * everything)):
        assert policy.is_full


def test_a_budget_that_is_just_the_cost_of_a_policy_is_met() -> None:
    for candidate in candidates(fixed(), 0.6, alpha=None, top=20):
        exact = optimize(fixed(), candidate.flops, alpha=None)
        assert spent_share(fixed(), exact) <= candidate.flops * (1 + 1e-12)
        assert exact.provenance is not None
        assert exact.provenance.divergence <= candidate.divergence + 1e-12  # type: ignore[operator]


def test_the_policy_says_where_it_comes_from() -> None:
    base = Policy.full(4).replace(reducer="random", reducer_options={"seed": 3}, positions="compact")
    policy = optimize(fixed(base=base), 0.4)
    source = policy.provenance
    assert source is not None
    assert (source.budget, source.samples, source.model_fingerprint) == (0.4, 2, "f" * 64)
    assert source.versions == (("torch", "2"), ("transformers", "5"))
    assert source.divergence == candidates(fixed(base=base), 0.4)[0].divergence
    assert (policy.reducer, policy.options, policy.positions) == ("random", {"seed": 3}, "compact")
    assert policy == Policy.from_json(policy.to_json())


def test_several_budgets_in_one_call() -> None:
    budgets = (0.9, 0.35, 1.0)
    assert optimize(fixed(), budgets) == [optimize(fixed(), budget) for budget in budgets]
    assert optimize(fixed(), []) == []


def test_the_split_space_is_the_default_and_finds_queries_apart() -> None:
    policy = optimize(fixed(), 0.5)
    assert policy == optimize(fixed(), 0.5, space="split")
    assert len(policy.pruned_layers("visual", "mha_query")) > len(policy.pruned_layers("visual", "mha_key_value"))
    joint = optimize(fixed(), 0.5, space="dop")
    assert joint.pruned_layers("visual", "mha_query") == joint.pruned_layers("visual", "mha_key_value")


@pytest.mark.parametrize(("model_type", "alpha"), [("llava", 1.5), ("llava_next", 1.5), ("internvl", 1.25)])
def test_the_automatic_alpha_is_the_papers(model_type: str, alpha: float) -> None:
    given_curves = fixed(visual=40, model_type=model_type)
    for budget in (0.3, 0.6, 0.9):
        policy = optimize(given_curves, budget, faithful=True)
        assert policy == optimize(given_curves, budget, alpha=alpha, faithful=True)
        entering = 40 if policy.visual_tokens is None else policy.visual_tokens
        assert entering >= least_tokens(given_curves, budget, alpha) > least_tokens(given_curves, budget, 0.5)


# --- laws


@examples(40)
@given(
    random_divergences(max_layers=5, max_tokens=9), BUDGETS, st.sampled_from(SPACES), st.sampled_from([None, "auto"])
)
def test_every_answer_is_feasible(divergences: Divergences, budget: float, space: str, alpha: str | None) -> None:
    try:
        policy = optimize(divergences, budget, space=space, alpha=alpha)
    except InfeasibleBudgetError:
        return
    assert spent_share(divergences, policy) <= budget * (1 + 1e-9)
    if len(divergences.counts) == 1:
        assert prefill_flops_ratio(divergences.dims, policy, *divergences.counts[0]) <= budget * (1 + 1e-9)


def predicted(divergences: Divergences, budget: float | None, **options: Any) -> float:
    try:
        return candidates(divergences, budget, **options)[0].divergence
    except InfeasibleBudgetError:
        return math.inf


@examples(40)
@given(random_divergences(max_layers=5, max_tokens=9), BUDGETS, BUDGETS, st.sampled_from(SPACES), st.booleans())
def test_without_alpha_more_budget_never_loses_more(
    divergences: Divergences, one: float, other: float, space: str, monotone: bool
) -> None:
    less, more = sorted((one, other))
    options = {"space": space, "alpha": None, "monotone": monotone}
    # A raw curve may promise a gain from pruning, which a budget of 1, being full, does not take
    assume(monotone or more < 1)
    assert predicted(divergences, more, **options) <= predicted(divergences, less, **options) + 1e-12
    whole = stored_bytes(divergences, Policy.full(divergences.num_layers))
    assert predicted(divergences, None, max_kv_bytes=more * whole, **options) <= (
        predicted(divergences, None, max_kv_bytes=less * whole, **options) + 1e-12
    )


@examples(40)
@given(random_divergences(max_layers=5, max_tokens=9), BUDGETS, st.sampled_from([None, "auto"]), st.booleans())
def test_the_split_space_is_never_worse(
    divergences: Divergences, budget: float, alpha: str | None, monotone: bool
) -> None:
    options: dict[str, Any] = {"alpha": alpha, "monotone": monotone}
    split, joint = (predicted(divergences, budget, space=space, **options) for space in ("split", "dop"))
    assert split <= joint + 1e-12


def named_bounds(error: BaseException) -> dict[str, tuple[float, float]]:
    """What was asked for and what is the least, by limit."""
    found = re.findall(r"(budget|max_kv_bytes): (\S+) asked for, (\S+) is the least", str(error))
    return {name: (float(asked), float(least)) for name, asked, least in found}


@examples(40)
@given(
    random_divergences(max_layers=5, max_tokens=9),
    st.floats(1e-4, 1),
    st.none() | st.floats(0, 1),
    st.sampled_from(SPACES),
    st.sampled_from([None, "auto", 3.0]),
)
def test_an_infeasible_budget_names_one_that_is_feasible(
    divergences: Divergences, budget: float, share: float | None, space: str, alpha: str | float | None
) -> None:
    whole = stored_bytes(divergences, Policy.full(divergences.num_layers))
    limit = None if share is None else share * whole
    options: dict[str, Any] = {"space": space, "alpha": alpha, "max_kv_bytes": limit}
    try:
        optimize(divergences, budget, **options)
        return
    except InfeasibleBudgetError as error:
        bounds = named_bounds(error)
    assert bounds
    alone = predicted(divergences, 1, space=space, alpha=alpha, max_kv_bytes=limit) == math.inf
    for name, (asked, least) in bounds.items():
        wanted: dict[str, Any] = {"budget": budget, "max_kv_bytes": limit}
        assert least >= asked * 0.999
        if alone and len(bounds) > 1:  # neither helps without the other
            wanted = {other: value[1] for other, value in bounds.items()}
            continue
        found = optimize(divergences, **wanted | {name: least}, space=space, alpha=alpha)
        assert found.num_layers == divergences.num_layers
        tighter = wanted | {name: least * 0.99}
        if name == "max_kv_bytes" or alpha is None:
            assert predicted(divergences, **tighter, space=space, alpha=alpha) == math.inf


def test_the_least_budget_pays_for_the_tokens_that_it_asks_for() -> None:
    """Where at most a quarter of the depth may go, 1.5 n_e tokens cost more than the budget that asks for them."""
    depths = {axis: (3,) for axis in ("mha_depth", "mlp_depth")}
    values = {axis: [[0.1]] for axis in depths} | {"visual_tokens": [[0.5], [2.0]]}
    given_curves = divergences_of(depths | {"visual_tokens": (0.5, 0.0)}, values, [(1, 40, 3)], dims_of(4))
    paper: dict[str, Any] = {"space": "dop", "faithful": True}
    with pytest.raises(InfeasibleBudgetError) as raised:
        optimize(given_curves, 0.3, **paper)
    asked, least = named_bounds(raised.value)["budget"]
    assert asked == 0.3
    assert optimize(given_curves, least, **paper).visual_tokens is None
    cheapest_now = policy_at(4, (3, 3, 3), least_tokens(given_curves, 0.3, 1.5))
    assert least > spent_share(given_curves, cheapest_now) + 0.1, "which is no answer, for it asks for more tokens"
    for budget in np.linspace(0.3, least - 0.001, 9):
        with pytest.raises(InfeasibleBudgetError):
            optimize(given_curves, float(budget), **paper)


def test_unmeasured_depths_are_not_used() -> None:
    """The lowest measured MLP depth is above the lowest of MHA: what is dead below the keys needs no MLP curve."""
    given_curves = divergences_of(
        {"mha_depth": (2,), "mlp_depth": (3,), "mha_query_depth": (1,), "visual_tokens": (0.5,)},
        {"mha_depth": [[0.3]], "mlp_depth": [[0.1]], "mha_query_depth": [[0.2]], "visual_tokens": [[0.4]]},
        [(1, 8, 2)],
        dims_of(4),
    )
    every = candidates(given_curves, 0.999, alpha=None, top=1000)
    depths = {tuple(4 - len(c.policy.pruned_layers("visual", m)) for m in ("mha_key_value", "mlp")) for c in every}
    assert (2, 2) in depths
    assert min(keys for keys, _ in depths) == 2
    assert all(mlp >= min(3, keys) for keys, mlp in depths)
    assert min(8 if c.policy.visual_tokens is None else c.policy.visual_tokens for c in every) >= 4


# --- joint measurement of the best


def test_the_jointly_best_candidate_is_returned() -> None:
    asked: list[Sequence[Policy]] = []

    def measure(policies: Sequence[Policy]) -> list[float]:
        asked.append(policies)
        return [5.0, 3.0, 0.25, 4.0][: len(policies)]

    options: dict[str, Any] = {"alpha": None, "faithful": True}
    best = candidates(fixed(), 0.4, top=4, alpha=None)
    policy = optimize(fixed(), 0.4, verify_top=4, measure=measure, **options)
    assert asked == [[candidate.policy for candidate in best]]
    assert policy.replace(provenance=None) == best[2].policy.replace(provenance=None)
    assert policy.provenance == dataclasses.replace(best[2].policy.provenance, measured_divergence=0.25)  # type: ignore[type-var]
    both = optimize(fixed(), [0.4, 1], verify_top=4, measure=measure, **options)
    assert both[0] == policy
    assert both[1].is_full
    assert len(asked) == 2, "a single candidate is not measured"


@pytest.mark.parametrize("joint", [[1.0], [math.nan] * 3])
def test_a_measurement_without_a_number_per_policy_is_refused(joint: list[float]) -> None:
    with pytest.raises(ValueError, match="measure: expected"):
        optimize(fixed(), 0.4, verify_top=3, measure=lambda policies: joint)


# --- time


def test_the_largest_geometry_takes_a_fraction_of_a_second() -> None:
    layers, rng = 40, np.random.default_rng(0)
    points = {axis: default_points(axis, layers) for axis in SPLIT_AXES}
    values = {axis: np.sort(rng.random((len(own), 100)), axis=0).tolist() for axis, own in points.items()}
    dims = DecoderDims(layers, 5120, 40, 128, 40, (13824,) * layers)
    given_curves = divergences_of(points, values, [(35, 2880, 100)] * 100, dims)
    seconds = []
    for _ in range(5):
        started = time.process_time()
        optimize(given_curves, 0.28)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.5


# --- wrong values


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda d: optimize(d), "budget: expected at least one of budget, max_kv_bytes"),
        (lambda d: optimize(d, 0), "budget: .*0 < budget <= 1, got 0"),
        (lambda d: optimize(d, -0.5), r"budget: .*got -0\.5"),
        (lambda d: optimize(d, 28), "budget: .*got 28"),
        (lambda d: optimize(d, math.nan), "budget: expected a finite number, got nan"),
        (lambda d: optimize(d, True), "budget: expected a number, got True"),
        (lambda d: optimize(d, "0.5"), "budget: expected a number, got '0.5'"),
        (lambda d: optimize(d, [0.5, 2]), "budget: .*got 2"),
        (lambda d: optimize(d, 0.5, space="joint"), "space: expected one of dop, split, got 'joint'"),
        (lambda d: optimize(d, 0.5, alpha=-1), "alpha: .*got -1"),
        (lambda d: optimize(d, 0.5, alpha="1.5"), "alpha: expected one of auto, got '1.5'"),
        (lambda d: optimize(d, 1, alpha=math.inf), "alpha: expected a finite number, got inf"),
        (lambda d: optimize(d, 0.5, max_kv_bytes="1 GB"), "max_kv_bytes: expected a number, got '1 GB'"),
        (lambda d: optimize(d, 0.5, verify_top=0), "verify_top: .*got 0"),
        (lambda d: optimize(d, 0.5, verify_top=2), "measure: verify_top needs a function"),
        (lambda d: candidates(d, 0.5, top=0), "top: .*got 0"),
        (lambda d: optimize(without_queries(d), 0.5), "axis 'mha_query_depth' was not measured; .*mha_depth"),
    ],
)
def test_wrong_values_are_named(attempt: Callable[[Divergences], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        attempt(fixed())


def without_queries(divergences: Divergences) -> Divergences:
    points = {axis: own for axis, own in divergences.points.items() if axis in DOP_AXES}
    return dataclasses.replace(divergences, points=points, values={axis: divergences.values[axis] for axis in points})


def test_the_papers_space_needs_the_papers_axes_only() -> None:
    given_curves = without_queries(fixed())
    assert optimize(given_curves, 0.5, space="dop") == optimize(fixed(), 0.5, space="dop")
