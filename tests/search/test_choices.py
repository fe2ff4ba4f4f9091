"""What is taken for a budget, beside fewer tokens alone: never worse, and reported on other samples."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dop_compile import Policy
from dop_compile.search import Divergences, InfeasibleBudgetError, choose, choose_each, optimize
from dop_compile.search.candidates import tokens_only
from dop_compile.search.choices import choices_table
from dop_compile.search.curves import curve
from tests.drawing import examples
from tests.search.synthetic import dims_of, divergences_of, random_divergences
from tests.search.test_optimize import spent_share, stored_bytes

Losses = np.ndarray[Any, np.dtype[np.float64]]


def alone_by_trying(divergences: Divergences, budget: float, share: float | None, monotone: bool) -> float:
    """The least predicted loss of any number of visual tokens that meets the budget; inf where none does."""
    losses = curve(divergences, "visual_tokens", monotone=monotone)
    whole = stored_bytes(divergences, Policy.full(divergences.num_layers))
    best = math.inf
    for tokens, loss in enumerate(losses):
        policy = Policy.depthwise(divergences.num_layers, visual_tokens=tokens)
        fits = spent_share(divergences, policy) <= budget * (1 + 1e-11)
        if fits and (share is None or stored_bytes(divergences, policy) <= share * whole * (1 + 1e-11)):
            best = min(best, loss)
    return best


@examples(40)
@given(
    random_divergences(max_layers=4, max_tokens=7), st.floats(0.05, 0.999), st.none() | st.floats(0.2, 1), st.booleans()
)
def test_tokens_only_is_what_trying_every_number_finds(
    divergences: Divergences, budget: float, share: float | None, monotone: bool
) -> None:
    limit = None if share is None else share * stored_bytes(divergences, Policy.full(divergences.num_layers))
    expected = alone_by_trying(divergences, budget, share, monotone)
    found = tokens_only(divergences, budget, max_kv_bytes=limit, monotone=monotone)
    if not math.isfinite(expected):
        assert found is None
        return
    assert found is not None
    assert found.divergence == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert not found.policy.pruned


@examples(40)
@given(
    random_divergences(max_layers=4, max_tokens=7),
    st.floats(0.05, 0.999),
    st.sampled_from([None, "auto", 3.0]),
    st.sampled_from(["dop", "split"]),
    st.integers(1, 9),
    st.integers(0, 99),
    st.booleans(),
)
def test_nothing_taken_is_worse_than_tokens_only(
    divergences: Divergences, budget: float, alpha: Any, space: str, samples: int, seed: int, runs: bool
) -> None:
    """Whatever alpha asks for, by prediction and by what whole policies measure."""
    asked: list[Losses] = []

    def measure(policies: Sequence[Policy]) -> Losses:
        asked.append(np.random.default_rng(seed).random((len(policies), samples)))
        return asked[0]

    settings: dict[str, Any] = {"alpha": alpha, "space": space, "measure": measure if runs else None}
    try:
        choice = choose(divergences, budget, **settings)
    except InfeasibleBudgetError:
        assert not math.isfinite(alone_by_trying(divergences, budget, None, True))
        return
    taken, alone = choice.taken, choice.tokens_only
    assert spent_share(divergences, taken.policy) <= budget * (1 + 1e-9)
    assert alone is not None or not math.isfinite(alone_by_trying(divergences, budget, None, True))
    if alone is not None:
        assert taken.loss <= alone.loss
    if not asked:
        assert choice.samples is None
        return
    (losses,) = asked
    assert choice.samples == ((samples, samples) if samples < 4 else ((samples + 1) // 2, samples // 2))
    assert taken.selected is not None
    assert taken.reported is not None
    means = losses.mean(axis=1)
    if samples < 4:
        assert taken.selected == taken.reported == pytest.approx(means.min())
    else:  # both halves together are all samples, of one of the policies
        total = (taken.selected * choice.samples[0] + taken.reported * choice.samples[1]) / samples
        assert np.isclose(means, total).any()
    source = taken.policy.provenance
    assert source is not None
    assert source.measured_divergence == taken.reported
    assert optimize(divergences, budget, **settings) == taken.policy


@examples(20)
@given(
    random_divergences(max_layers=4, max_tokens=7),
    st.lists(st.floats(0.05, 1), min_size=2, max_size=4, unique=True),
    st.booleans(),
)
def test_who_may_spend_more_is_not_given_worse(divergences: Divergences, budgets: list[float], runs: bool) -> None:
    """What whole policies measure is anything, the same whenever it is asked for."""

    def measure(policies: Sequence[Policy]) -> Losses:
        def losses(policy: Policy) -> Losses:
            seed = zlib.crc32(policy.replace(provenance=None).to_json().encode())
            return np.random.default_rng(seed).random(6) * (not policy.is_full)

        return np.stack([losses(policy) for policy in policies])

    try:
        choices = choose_each(divergences, budgets, measure=measure if runs else None)
    except InfeasibleBudgetError:
        assert not math.isfinite(alone_by_trying(divergences, min(budgets), None, True))
        return
    ordered = sorted(zip(budgets, choices, strict=True), key=lambda pair: pair[0])
    losses = [choice.taken.loss for _, choice in ordered]
    assert all(more <= less + 1e-12 for less, more in itertools.pairwise(losses))
    for budget, choice in ordered:
        source = choice.taken.policy.provenance
        assert source is not None
        assert source.budget == budget
        assert choice.taken.candidate.flops <= budget * (1 + 1e-9)


def test_what_is_reported_was_not_selected_on() -> None:
    """A policy that is best on every other sample alone is not reported by those it was taken by."""
    curves = steep()
    values: dict[int, float] = {}

    def measure(policies: Sequence[Policy]) -> Losses:
        losses = np.random.default_rng(0).random((len(policies), 12))
        values.update(enumerate(losses.mean(axis=1)))
        return losses

    choice = choose(curves, 0.5, measure=measure)
    assert choice.taken.selected is not None
    assert choice.taken.reported is not None
    assert choice.taken.selected < min(values.values()), "the least of noise is lower than any mean"
    assert choice.taken.reported > choice.taken.selected
    other = choose(Divergences(**{**vars(curves), "seed": curves.seed + 1}), 0.5, measure=measure)
    assert other.taken.selected != choice.taken.selected, "drawn by the seed"


def steep() -> Divergences:
    """Depth is dear and tokens cost nothing: what the bound on tokens keeps is paid for in depth."""
    depths = {axis: (2, 0) for axis in ("mha_depth", "mlp_depth", "mha_query_depth")}
    values = {axis: [[1.0], [5.0]] for axis in depths} | {"visual_tokens": [[0.001], [0.002]]}
    return divergences_of(depths | {"visual_tokens": (0.5, 0.0)}, values, [(2, 40, 4)], dims_of(4))


def test_where_the_bound_costs_it_is_said() -> None:
    paper, default = (choose(steep(), 0.5, faithful=faithful) for faithful in (True, False))
    assert paper.taken.loss > 0.2
    assert paper.tokens_only is None
    assert default.taken.loss < 0.002
    assert not default.taken.policy.pruned
    text = choices_table(steep(), {"50%": default})
    assert "50% tokens only" in text
    assert "no pruned operation does better than fewer tokens alone" in text
    assert "nothing was run" in text
    assert "tokens only" not in choices_table(steep(), {"50%": paper})

    def measure(policies: Sequence[Policy]) -> list[float]:  # fewer tokens and a pruned depth together are best
        return [0.5 if not p.pruned else 0.1 if (p.visual_tokens or 40) < 30 else 0.7 for p in policies]

    run = choose(steep(), 0.5, measure=measure)
    assert run.taken.policy.pruned
    assert run.taken.loss == 0.1
    note = "the bound on visual tokens (alpha, DOP C.4) would have cost 0.7000 instead of 0.1000"
    assert note in choices_table(steep(), {"50%": run})
    assert "1 samples are too few to be halved" in choices_table(steep(), {"50%": run})


def test_a_budget_that_alpha_cannot_meet_is_met_without_it() -> None:
    values = {axis: [[0.1]] for axis in ("mha_depth", "mlp_depth")} | {"visual_tokens": [[0.5], [2.0]]}
    depths = {axis: (3,) for axis in ("mha_depth", "mlp_depth")}
    curves = divergences_of(depths | {"visual_tokens": (0.5, 0.0)}, values, [(1, 40, 3)], dims_of(4))
    with pytest.raises(InfeasibleBudgetError):
        choose(curves, 0.3, space="dop", faithful=True)
    choice = choose(curves, 0.3, space="dop")
    assert choice.bounded is None
    assert choice.taken.candidate.flops <= 0.3
    if choice.tokens_only is None or choice.taken.candidate != choice.tokens_only.candidate:
        assert "as many visual tokens as alpha asks for" in choices_table(curves, {"30%": choice})
