"""What curves predict of a policy, against the search that adds them up and against plain sums."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dop_compile import Policy
from dop_compile.policy.provenance import Provenance
from dop_compile.search import Divergences
from dop_compile.search.optimize import candidates
from dop_compile.search.predict import additive_divergence, predicted_divergence
from tests.search.synthetic import make_divergences, random_divergences


@settings(deadline=None, max_examples=25)
@given(random_divergences(from_zero=True), st.sampled_from(["dop", "split"]), st.booleans())
def test_the_prediction_is_that_of_the_search(divergences: Divergences, space: str, monotone: bool) -> None:
    found = candidates(divergences, max_kv_bytes=1e12, space=space, alpha=None, monotone=monotone, top=6)
    for candidate in found:
        assert additive_divergence(divergences, candidate.policy, space, monotone=monotone) == pytest.approx(
            candidate.divergence, rel=1e-9, abs=1e-12
        )
        assert predicted_divergence(divergences, candidate.policy) == candidate.policy.provenance.divergence  # type: ignore[union-attr]


def test_a_policy_written_by_hand_is_a_sum_of_curves() -> None:
    divergences = make_divergences(layers=4, visual=8)
    joint = Policy.depthwise(4, mha_depth=2, mlp_depth=1, visual_tokens=4)
    apart = Policy.depthwise(4, mha_query_depth=1, mha_key_value_depth=3, mlp_depth=2)
    at = {axis: dict(enumerate(divergences.means(axis))) for axis in divergences.points}  # measured at every value
    sums = at["mha_depth"][2] + at["mlp_depth"][1] + at["visual_tokens"][4]
    assert predicted_divergence(divergences, joint) == pytest.approx(sums)
    updates = at["mha_query_depth"][1] - at["mha_query_depth"][3] + at["mlp_depth"][2] - at["mlp_depth"][3]
    assert predicted_divergence(divergences, apart) == pytest.approx(at["mha_depth"][3] + updates)
    assert predicted_divergence(divergences, Policy.full(4)) == 0


def test_a_measured_value_is_no_prediction() -> None:
    """Files of earlier releases held one in the field of the other."""
    divergences = make_divergences(layers=4, visual=8)
    policy = Policy.depthwise(4, mha_depth=2, mlp_depth=1, visual_tokens=4)
    plain = predicted_divergence(divergences, policy)
    assert plain is not None
    stored = policy.replace(provenance=Provenance("f" * 64, divergence=plain + 0.5))
    assert predicted_divergence(divergences, stored) == plain


@pytest.mark.parametrize(
    "policy",
    [
        Policy.from_operations(4, pruned=[("visual", 1, "mlp")]),
        Policy.depthwise(4, mlp_depth=2, system_mlp_depth=1),
        Policy.full(4).replace(salient_fraction=0.5),
        Policy.depthwise(4, mlp_depth=2, visual_tokens=3, reducer="random"),
        Policy.depthwise(4, mlp_depth=2, visual_tokens=3, positions="compact"),
    ],
)
def test_of_other_policies_nothing_is_predicted(policy: Policy) -> None:
    assert predicted_divergence(make_divergences(layers=4, visual=8), policy) is None


def test_axes_that_were_not_measured_predict_nothing() -> None:
    divergences = make_divergences(layers=4, visual=8)
    fewer = {axis: own for axis, own in divergences.points.items() if axis != "mha_query_depth"}
    values = {axis: divergences.values[axis] for axis in fewer}
    own = dataclasses.replace(divergences, points=fewer, values=values)
    assert predicted_divergence(own, Policy.depthwise(4, mha_query_depth=1)) is None
    assert predicted_divergence(own, Policy.depthwise(4, mha_depth=2)) is not None
