"""Transfer between geometries: the laws of DOP C.5."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dop_compile.policy.costs import prefill_flops_ratio
from dop_compile.search import Divergences, candidates, optimize, transfer
from dop_compile.search.axes import tokens_kept
from dop_compile.search.curves import curve
from tests.drawing import examples
from tests.search.synthetic import DEPTHS, dims_of, divergences_of, random_divergences

AXES = (*DEPTHS, "visual_tokens")
SOURCE = divergences_of(
    {"mha_depth": (6, 4, 1), "mlp_depth": (6, 2, 0), "mha_query_depth": (4, 0), "visual_tokens": (0.75, 0.5, 0.25)},
    {
        "mha_depth": [[0.2, 0.4], [0.5, 0.5], [3.0, 2.0]],
        "mlp_depth": [[0.0, 0.1], [0.3, 0.2], [1.0, 2.0]],
        "mha_query_depth": [[0.1, 0.1], [1.5, 1.0]],
        "visual_tokens": [[0.1, 0.0], [0.4, 0.2], [2.0, 1.0]],
    },
    [(2, 16, 5), (2, 16, 3)],
    dims_of(8),
)
TARGET = {"model_type": "qwen2_5_vl", "model_fingerprint": "t" * 64}


def with_layers(divergences: Divergences, layers: int, visual: int) -> Divergences:
    return transfer(divergences, dims_of(layers), [(3, visual, 7)], **TARGET)


def to_itself(divergences: Divergences) -> Divergences:
    return transfer(
        divergences,
        divergences.dims,
        divergences.counts,
        model_type=divergences.model_type,
        model_fingerprint=divergences.model_fingerprint,
    )


def of_whole_tokens(divergences: Divergences) -> Divergences:
    """The same, of samples with as many visual tokens each, measured at whole tokens: nothing is to interpolate."""
    visual = divergences.visual_tokens
    fractions = tuple(tokens_kept(point, visual) / visual for point in divergences.points["visual_tokens"])
    return dataclasses.replace(
        divergences,
        counts=tuple((system, visual, text) for system, _, text in divergences.counts),
        points={**divergences.points, "visual_tokens": fractions},
    )


@examples(40)
@given(random_divergences())
def test_to_the_same_geometry_nothing_changes(drawn: Divergences) -> None:
    for axis in DEPTHS:
        np.testing.assert_allclose(curve(to_itself(drawn), axis), curve(drawn, axis), rtol=1e-12)
    divergences = of_whole_tokens(drawn)
    same = to_itself(divergences)
    for axis in AXES:
        for monotone in (False, True):
            np.testing.assert_allclose(
                curve(same, axis, monotone=monotone), curve(divergences, axis, monotone=monotone), rtol=1e-12
            )
    for budget in (0.7, 1.0):
        for alpha in (None, 0.5):
            try:
                expected = candidates(divergences, budget, alpha=alpha)
            except ValueError:
                continue
            assert candidates(same, budget, alpha=alpha) == expected


FOUR = divergences_of(
    {"visual_tokens": (0.75, 0.5, 0.25, 0.0)},
    {"visual_tokens": [[0.1, 0.3, 0.0, 0.2], [0.4, 0.9, 0.1, 0.6], [2.0, 1.5, 0.7, 1.0], [3.0, 2.5, 4.0, 3.5]]},
    [(2, 16, 5)] * 4,
    dims_of(8),
)
PROMPTS = [(3, 10, 9), (3, 100, 9)]


@pytest.mark.parametrize("times", [2, 3])
def test_as_many_prompts_as_were_measured_are_not_the_measured_ones(times: int) -> None:
    """The same prompts several times are the same target; two times two are as many as the source's samples."""
    once, more = (transfer(FOUR, FOUR.dims, PROMPTS * n, **TARGET) for n in (1, times))
    np.testing.assert_allclose(curve(more, "visual_tokens"), curve(once, "visual_tokens"), rtol=1e-12)
    assert more.sample_tokens == once.sample_tokens == (100,) * 4
    assert more.transferred


@pytest.mark.parametrize("prompts", [1, 2, 4, 5])
@pytest.mark.parametrize("draws", [1, 2, 4, 5])
def test_a_subset_keeps_the_target(prompts: int, draws: int) -> None:
    """Whatever the number of prompts and of draws: only the values are those of the drawn samples."""
    target = transfer(FOUR, FOUR.dims, [(3, 10, 9), *[(3, 100, 9)] * 4][-prompts:], **TARGET)
    part = target.subset([1] * draws)
    expected = np.interp(range(101), [0, 25, 50, 75, 100], [2.5, 1.5, 0.9, 0.3, 0])
    np.testing.assert_allclose(curve(part, "visual_tokens"), expected, rtol=1e-12)
    assert (part.transferred, part.counts) == (True, target.counts)


def test_divergences_of_another_model_stay_so_in_their_file(tmp_path: Path) -> None:
    target = transfer(FOUR, FOUR.dims, PROMPTS * 2, **TARGET)
    target.save(tmp_path / "target.json")
    again = Divergences.load(tmp_path / "target.json")
    assert again == target
    np.testing.assert_array_equal(curve(again, "visual_tokens"), curve(target, "visual_tokens"))


def test_depths_scale_with_the_layers_and_tokens_with_the_tokens() -> None:
    """At every place that both geometries have, the curves are equal."""
    longer = with_layers(SOURCE, 16, 48)
    for axis in AXES:
        scale = 3 if axis == "visual_tokens" else 2
        np.testing.assert_allclose(curve(longer, axis)[::scale], curve(SOURCE, axis), rtol=1e-12)


@given(st.integers(1, 40), st.integers(1, 60))
def test_any_target_interpolates_between_the_rescaled_points(layers: int, visual: int) -> None:
    target = with_layers(SOURCE, layers, visual)
    for axis in AXES:
        source_full, full = (16, visual) if axis == "visual_tokens" else (8, layers)
        known = [p * source_full if axis == "visual_tokens" else p for p in reversed(SOURCE.points[axis])]
        places = np.array([*known, source_full]) * full / source_full
        means = [*SOURCE.array(axis).mean(axis=1)[::-1], 0.0]
        expected = np.interp(range(full + 1), places, means)
        inside = np.arange(full + 1) >= places[0] - 1e-9
        found = curve(target, axis, monotone=False)
        np.testing.assert_allclose(found[inside], expected[inside], rtol=1e-9, atol=1e-12)
        assert np.isinf(found[~inside]).all()


def test_counted_points_become_shares_of_the_source() -> None:
    points = {**SOURCE.points, "visual_tokens": (12, 8, 4)}
    counted = divergences_of(points, SOURCE.values, SOURCE.counts, SOURCE.dims)
    for visual in (16, 5, 40):
        np.testing.assert_allclose(
            curve(with_layers(counted, 8, visual), "visual_tokens"),
            curve(with_layers(SOURCE, 8, visual), "visual_tokens"),
        )


def test_counts_beyond_the_source_are_all_of_it() -> None:
    points = {**SOURCE.points, "visual_tokens": (40, 8, 4)}
    target = with_layers(divergences_of(points, SOURCE.values, SOURCE.counts, SOURCE.dims), 8, 24)
    assert target.points["visual_tokens"] == (1.0, 0.5, 0.25)


@pytest.mark.parametrize("budget", [0.6, 0.35])
@pytest.mark.parametrize("space", ["dop", "split"])
def test_policies_are_for_the_target(budget: float, space: str) -> None:
    target = transfer(SOURCE, dims_of(12, hidden_size=32), [(1, 30, 4)], **TARGET, dtype_bytes=4)
    policy = optimize(target, budget, space=space)
    assert policy.num_layers == 12
    assert policy.provenance is not None
    assert policy.provenance.model_fingerprint == "t" * 64
    assert policy.provenance.samples == 2, "the samples measured, not the target's prompts"
    assert 0 < prefill_flops_ratio(target.dims, policy, 1, 30, 4) <= budget
    assert target.dtype_bytes == 4
    # n_min is the target's: 1.25 for a Qwen, of the tokens that alone meet the budget there
    entering = 30 if policy.visual_tokens is None else policy.visual_tokens
    full = policy.replace(pruned=frozenset(), provenance=None)
    shares = [prefill_flops_ratio(target.dims, full.replace(visual_tokens=n), 1, 30, 4) for n in range(31)]
    nearest = min(range(31), key=lambda n: abs(shares[n] - budget))
    assert entering >= min(30, round(1.25 * nearest))


def test_the_reducer_and_its_options_go_along() -> None:
    base = SOURCE.base.replace(reducer="random", reducer_options={"seed": 5}, positions="compact")
    source = divergences_of(SOURCE.points, SOURCE.values, SOURCE.counts, SOURCE.dims, base=base)
    target = with_layers(source, 12, 30)
    assert target.base == base.replace(num_layers=12)
    again = Divergences.from_json(target.to_json())
    assert again == target


@pytest.mark.parametrize(
    ("counts", "message"), [([], "counts: expected at least one"), ([(3, 0, 4)], "counts: .*visual")]
)
def test_a_target_without_visual_tokens_is_refused(counts: list[tuple[int, int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transfer(SOURCE, dims_of(4), counts, **TARGET)
