"""Methods brought to a budget: token counts by brute force, refusals by name."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from dop_compile import Policy
from dop_compile.evaluation import Method, Planner, method_names
from dop_compile.evaluation.in_decoder import RANKED
from dop_compile.hf.dimensions import DecoderDims
from dop_compile.policy.costs import LayerTokens, layer_flops, prefill_flops
from dop_compile.policy.operations import Operation
from dop_compile.policy.provenance import Provenance
from dop_compile.policy.ranking import Ranking, Stage
from dop_compile.search import AttentionShares, InfeasibleBudgetError, OperationOrder, fit_prune
from dop_compile.search.greedy_sort import Step
from tests.search.synthetic import dims_of, make_divergences

LAYERS, VISUAL, MODEL = 4, 40, "f" * 64
COUNTS = ((2, VISUAL, 9), (3, 17, 30), (2, VISUAL, 9), (0, 0, 25), (5, 31, 2))
DIMS = dims_of(LAYERS)


def planner(**changes: Any) -> Planner:
    settings: dict[str, Any] = {"dims": DIMS, "counts": COUNTS, "model_type": "llava", "fingerprint": MODEL, **changes}
    return Planner(**settings)


def share(policy: Policy, counts: Sequence[tuple[int, int, int]] = COUNTS) -> float:
    """FLOPs of a policy on the samples, of the original's."""
    spent, whole = (sum(prefill_flops(DIMS, p, *row) for row in counts) for p in (policy, Policy.full(LAYERS)))
    return spent / whole


@pytest.mark.parametrize("seed", range(6))
def test_a_reducer_alone_keeps_the_most_tokens_that_fit(seed: int) -> None:
    draw = random.Random(seed)
    counts = [(draw.randint(0, 9), draw.randint(1, 60), draw.randint(1, 20)) for _ in range(draw.randint(1, 7))]
    plan, full = planner(counts=counts), Policy.full(LAYERS)
    largest = max(visual for _, visual, _ in counts)
    costs = [share(full.replace(visual_tokens=n), counts) for n in range(largest + 1)]
    for budget in (*(draw.uniform(costs[0], 1) for _ in range(8)), costs[0], costs[largest // 2], 1.0):
        method = plan.named("random", budget)
        assert method.policy is not None
        fitting = max(n for n, cost in enumerate(costs) if cost <= budget * (1 + 1e-12))
        kept = method.policy.visual_tokens
        assert (largest if kept is None else kept) == fitting
        assert plan.flops(method.policy) == pytest.approx(costs[fitting])
        assert (method.policy.reducer, method.policy.pruned) == ("random", frozenset())
        assert method.label == f"random {100 * budget:g}%"


def test_options_and_positions_are_the_policys() -> None:
    method = planner(positions="compact").reduced("random", 0.6, {"seed": 4})
    assert method.policy is not None
    assert (method.policy.positions, method.policy.options) == ("compact", {"seed": 4})


def test_the_original_and_the_full_policy_take_no_budget() -> None:
    assert planner().named("original", 0.3) == Method("original")
    full = planner().named("full", None)
    assert (full.label, full.policy) == ("full", Policy.full(LAYERS))


@pytest.mark.parametrize("counts", [COUNTS, COUNTS[:3], ((1, 80, 3),)])
@pytest.mark.parametrize("space", ["dop", "split"])
def test_searched_policies_fit_the_evaluated_samples(space: str, counts: Any) -> None:
    """The divergences are of three samples with other counts."""
    divergences = make_divergences(LAYERS, 20)
    plan = planner(counts=counts, divergences=divergences)
    found = []
    for budget in (0.9, 0.6):
        method = plan.searched(space, budget, alpha=None)
        assert method.policy is not None
        assert share(method.policy, counts) <= budget * (1 + 1e-12)
        found.append(share(method.policy, counts))
        other = plan.searched(space, budget, "random", alpha=None)
        assert other.policy == method.policy.replace(reducer="random")
        assert other.label == f"{space}+random {100 * budget:g}%"
    # Close to the budget: the next visual token, or layer, would not fit
    assert found[0] > found[1] > 0.5


def test_evaluated_samples_are_not_taken_for_the_measured_ones() -> None:
    """There are three of either; only the evaluated ones' costs count, which are the same when each is there twice."""
    counts = ((2, 80, 9), (3, 17, 30), (2, 48, 9))
    divergences = make_divergences(LAYERS, 20)
    once, twice = (planner(counts=given, divergences=divergences) for given in (counts, counts * 2))
    for budget in (0.9, 0.8, 0.7, 0.6, 0.5):
        for space in ("dop", "split"):
            assert once.searched(space, budget, alpha=None) == twice.searched(space, budget, alpha=None)


def test_names_of_searched_methods() -> None:
    plan = planner(divergences=make_divergences(LAYERS, 20))
    policies = [plan.named(name, 0.95).policy for name in ("split", "split+uniform", "split+random")]
    assert policies[0] == policies[1]
    assert [p.reducer for p in policies if p] == ["uniform", "uniform", "random"]
    assert {"original", "full", "dop", "split", "uniform", "random"} <= set(method_names())
    assert "given" not in method_names()


def order(fingerprint: str = MODEL) -> OperationOrder:
    """Layers pruned from the last: keys, of which queries and MLP go with them."""
    base = Policy.full(LAYERS).replace(salient_fraction=0.5)
    steps = []
    for layer in reversed(range(LAYERS)):
        for group in ("visual_rest", "visual_salient"):
            steps += [Step(Operation(group, layer, module), 0.1) for module in ("mlp", "mha_query", "mha_key_value")]
    return OperationOrder(
        fingerprint, DIMS, "top_k_kl", (), base, ((2, 9, 3),), ("0",), frozenset(), frozenset(), 0.0, tuple(steps), 1
    )


def test_an_order_gives_its_shortest_prefix_that_fits() -> None:
    plan, found = planner(), order()
    policies = found.policies()
    costs = [share(policy) for policy in policies]
    for budget in (1.0, 0.9, 0.75, costs[5], costs[-1]):
        first = min(n for n, cost in enumerate(costs) if cost <= budget * (1 + 1e-12))
        assert plan.ordered("gsop", found, budget) == Method("gsop", budget, policies[first])
    with pytest.raises(ValueError, match=r"no prefix meets the budget.*is the least"):
        plan.ordered("gsop", found, costs[-1] * 0.99)


def test_pictures_are_the_largest_that_fit() -> None:
    def samples(most: int) -> list[dict[str, Any]]:
        return [{"counts": (system, min(visual, most) // 2 * 2, text)} for system, visual, text in COUNTS]

    def count(given: list[dict[str, Any]]) -> list[tuple[int, int, int]]:
        return [sample["counts"] for sample in given]

    full = Policy.full(LAYERS)
    whole = sum(prefill_flops(DIMS, full, *row) for row in COUNTS)
    costs = [sum(prefill_flops(DIMS, full, *row) for row in count(samples(n))) / whole for n in range(1, VISUAL + 1)]
    method = planner().resized(0.6, samples, count)
    most = max(n for n, cost in enumerate(costs, start=1) if cost <= 0.6)
    assert method.samples == samples(most)
    assert method.counts == tuple(count(samples(most)))
    assert (method.label, method.policy) == ("resize 60%", None)
    with pytest.raises(ValueError, match="no size of pictures"):
        planner().resized(costs[0] * 0.99, samples, count)


def test_bad_input() -> None:
    plan = planner()
    with pytest.raises(ValueError, match=r"method: expected one of .*did you mean 'uniform'\?"):
        plan.named("unifrom", 0.5)
    with pytest.raises(ValueError, match=r"reducer of the method: .*did you mean 'random'\?"):
        plan.named("split+randon", 0.5)
    with pytest.raises(ValueError, match="expected one of"):
        plan.named("given", 0.5)
    with pytest.raises(TypeError, match="made for a budget"):
        plan.named("uniform", None)
    with pytest.raises(ValueError, match=r"no number of visual tokens meets the budget \(budget: 0.01 asked for"):
        plan.named("uniform", 0.01)
    with pytest.raises(ValueError, match="0 < budget <= 1"):
        plan.named("uniform", 1.1)
    with pytest.raises(ValueError, match="unknown option 'sed'"):
        plan.reduced("random", 0.5, {"sed": 1})
    with pytest.raises(TypeError, match="'dop': it is found in measured divergences"):
        plan.named("dop", 0.5)
    with pytest.raises(ValueError, match="no policy meets the budget"):
        planner(divergences=make_divergences(LAYERS, 20)).named("dop", 0.05)
    with pytest.raises(ValueError, match="no sample has visual tokens"):
        planner(counts=[(3, 0, 2)])
    with pytest.raises(ValueError, match="at least one sample"):
        planner(counts=[])


def test_what_was_made_for_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="divergences: made for another model"):
        planner(fingerprint="e" * 64, divergences=make_divergences(LAYERS, 20))
    with pytest.raises(ValueError, match="order 'gsop': made for another model"):
        planner().ordered("gsop", order("e" * 64), 0.9)
    foreign = Policy.full(LAYERS).replace(provenance=Provenance("e" * 64))
    with pytest.raises(ValueError, match="policy 'mine': made for another model"):
        planner().given("mine", foreign)
    with pytest.raises(ValueError, match="the policy is for 9 layers"):
        planner().given("mine", Policy.full(9))
    with pytest.raises(ValueError, match="do not say which tokens"):
        planner().given("mine", Policy.full(LAYERS).replace(reducer="given"))
    assert planner().given("mine", Policy.full(LAYERS)) == Method("mine", None, Policy.full(LAYERS))


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm", "dart"])
def test_methods_inside_the_decoder_meet_the_budget_by_their_first_fraction(name: str) -> None:
    for budget in (0.95, 0.7, 0.5):
        method = planner().named(name, budget)
        assert method.policy is not None
        assert share(method.policy) <= budget
        assert method.policy.ranking is not None
        first = method.policy.ranking.stages[0].fraction
        assert first is not None
        if first < 1:
            finer = [planner().named(name, b).policy for b in (budget + 0.002, budget + 0.05)]
            assert all(share(other) >= share(method.policy) for other in finer if other is not None)
            assert share(finer[1]) > budget - 0.05  # type: ignore[arg-type]


LLAVA = DecoderDims(32, 4096, 32, 128, 32, (11008,) * 32)


@pytest.mark.parametrize("schedule", [(66, 30, 17), (303, 110, 36), (300, 200, 110)])
def test_sparsevlm_at_the_flops_of_a_published_schedule_is_that_schedule(schedule: tuple[int, ...]) -> None:
    counts = [(35, 576, 60), (35, 576, 90)]
    plan = planner(dims=LLAVA, counts=counts)
    stages = tuple(Stage(layer, tokens=kept) for layer, kept in zip((2, 6, 15), schedule, strict=True))
    published = Policy.full(32).replace(ranking=Ranking("text_raters", stages))
    method = plan.named("sparsevlm", plan.flops(published))
    assert method.policy is not None
    assert method.policy.ranking is not None
    assert [(stage.layer, stage.count(576)) for stage in method.policy.ranking.stages] == [
        (stage.layer, stage.count(576)) for stage in stages
    ]


def ranked_flops(name: str, layers: int, visual: int) -> list[int]:
    """Of each member of a family that a planner looks at, for one sample."""
    dims = DecoderDims(layers, 4096, 32, 128, 32, (11008,) * layers)
    return [prefill_flops(dims, RANKED[name](layers, n / 1000), 35, visual, 60) for n in range(1001)]


@pytest.mark.parametrize(("layers", "visual"), [(32, 576), (28, 576), (40, 2880), (8, 144), (8, 64)])
@pytest.mark.parametrize("name", RANKED)
def test_flops_grow_with_what_is_made_to_fit(name: str, layers: int, visual: int) -> None:
    costs = ranked_flops(name, layers, visual)
    assert costs == sorted(costs)
    assert costs[-1] == prefill_flops(
        DecoderDims(layers, 4096, 32, 128, 32, (11008,) * layers), Policy.full(layers), 35, visual, 60
    )


@pytest.mark.parametrize("visual", [21, 40, 97, 250])
def test_rounding_takes_back_one_token_of_sparsevlms_first_stage_at_most(visual: int) -> None:
    """Of one small picture, between the schedules 128 and 192."""
    costs = ranked_flops("sparsevlm", 32, visual)
    first = [layer_flops(LLAVA, LayerTokens(n, n, n), 0) for n in (95 + visual, 94 + visual)]
    falls = [before - after for before, after in itertools.pairwise(costs) if after < before]
    assert len(falls) <= 1
    assert all(fall <= 4 * (first[0] - first[1]) for fall in falls)


def test_what_comes_before_the_first_stage_has_to_fit() -> None:
    with pytest.raises(InfeasibleBudgetError, match=r"fastv: .* the first layers have every token"):
        planner().named("fastv", 0.05)


def test_fitprune_needs_measured_attention() -> None:
    with pytest.raises(TypeError, match="give shares"):
        planner().named("fitprune", 0.5)
    curves = np.tile(np.linspace(0, 1, 1001) ** 2, (LAYERS - 1, 1))
    shares = AttentionShares(curves, curves, 3)
    method = planner(shares=shares).named("fitprune", 0.5)
    assert method.policy == fit_prune(shares, DIMS, COUNTS, 0.5)
