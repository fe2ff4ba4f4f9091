"""Curves against scipy's interpolation, sample by sample."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import interp1d

from dop_compile.search import Divergences
from dop_compile.search.curves import curve
from tests.drawing import examples
from tests.search.synthetic import DEPTHS, dims_of, divergences_of, random_divergences


def half_up(number: float) -> int:
    return int(np.floor(number + 0.5))


def interpolated(known: dict[float, float], wanted: int) -> float:
    """Linear between known values, infinite below all of them, the last one above."""
    if len(known) == 1:
        return next(iter(known.values())) if wanted >= next(iter(known)) else np.inf
    places = sorted(known)
    values = [known[place] for place in places]
    line = interp1d(places, values, bounds_error=False, fill_value=(np.inf, values[-1]))
    return float(line(wanted))


def raw_curve(divergences: Divergences, axis: str) -> list[float]:
    """The mean over samples of each sample's own interpolation, with the known zero at the full value."""
    full = divergences.num_layers if axis in DEPTHS else max(visual for _, visual, _ in divergences.counts)
    result = []
    for wanted in range(full + 1):
        per_sample = []
        for sample, (_, visual, _) in enumerate(divergences.counts):
            own_full = full if axis in DEPTHS else visual
            known = {}
            for point, row in zip(divergences.points[axis], divergences.values[axis], strict=True):
                # Several points may keep as many whole tokens; a measurement gives them the same divergence
                known[point if axis in DEPTHS else half_up(point * visual)] = row[sample]
            known[own_full] = 0.0
            per_sample.append(interpolated(known, wanted))
        result.append(float(np.mean(per_sample)))
    return result


def distinct_tokens(divergences: Divergences) -> bool:
    """Whether no two points keep as many tokens of a sample, and none keeps all."""
    points = divergences.points["visual_tokens"]
    return all(
        len({half_up(point * visual) for point in points} | {visual}) == len(points) + 1
        for _, visual, _ in divergences.counts
    )


@examples(50)
@given(random_divergences(max_layers=9, max_tokens=30), st.sampled_from([*DEPTHS, "visual_tokens"]))
def test_the_raw_curve_is_linear_between_points(divergences: Divergences, axis: str) -> None:
    if axis == "visual_tokens" and not distinct_tokens(divergences):
        return
    np.testing.assert_allclose(
        curve(divergences, axis, monotone=False), raw_curve(divergences, axis), rtol=1e-9, atol=1e-12
    )


@examples(50)
@given(random_divergences(max_layers=9, max_tokens=30, low=-1.0), st.sampled_from([*DEPTHS, "visual_tokens"]))
def test_the_monotone_curve_is_the_least_at_or_below(divergences: Divergences, axis: str) -> None:
    raw = curve(divergences, axis, monotone=False).tolist()
    expected = [min(max(value, 0.0) for value in raw[: place + 1]) for place in range(len(raw))]
    assert curve(divergences, axis).tolist() == expected
    assert curve(divergences, axis)[-1] == 0


LAYERS = 8
COUNTS = [(2, 12, 3), (2, 6, 3)]
GIVEN = divergences_of(
    {"mha_depth": (6, 2), "visual_tokens": (0.75, 0.5, 1 / 6)},
    {"mha_depth": [[0.1, 0.3], [1.0, 2.0]], "visual_tokens": [[0.2, 0.4], [0.6, 0.5], [4.0, 2.0]]},
    COUNTS,
    dims_of(LAYERS),
)


def test_measured_points_are_on_the_curve() -> None:
    found = curve(GIVEN, "mha_depth", monotone=False)
    assert found[6] == pytest.approx(0.2)
    assert found[2] == pytest.approx(1.5)
    assert found[4] == pytest.approx((0.2 + 1.5) / 2)
    assert found[LAYERS] == 0


def test_below_the_lowest_point_nothing_is_known() -> None:
    for monotone in (False, True):
        assert np.isinf(curve(GIVEN, "mha_depth", monotone=monotone)).tolist() == [True, True] + [False] * 7
        assert np.isinf(curve(GIVEN, "visual_tokens", monotone=monotone)).tolist() == [True, True] + [False] * 11


def test_a_sample_with_fewer_visual_tokens_loses_nothing_above_them() -> None:
    """The first of 12 tokens was measured with 9, 6 and 2, the second of 6 with 5, 3 and 1."""
    first = np.interp(range(13), [2, 6, 9, 12], [4.0, 0.6, 0.2, 0.0])
    second = np.interp(range(13), [1, 3, 5, 6], [2.0, 0.5, 0.4, 0.0])
    assert second[6:].tolist() == [0.0] * 7
    found = curve(GIVEN, "visual_tokens", monotone=False)
    np.testing.assert_allclose(found[2:], ((first + second) / 2)[2:], rtol=1e-12)


def test_noise_that_rises_is_only_in_the_raw_curve() -> None:
    noisy = divergences_of(
        {"mlp_depth": (6, 4, 2, 0)}, {"mlp_depth": [[0.5], [0.1], [3.0], [2.0]]}, COUNTS[:1], dims_of(8)
    )
    assert curve(noisy, "mlp_depth", monotone=False).tolist() == pytest.approx(
        [2, 2.5, 3, 1.55, 0.1, 0.3, 0.5, 0.25, 0]
    )
    assert curve(noisy, "mlp_depth").tolist() == pytest.approx([2, 2, 2, 1.55, 0.1, 0.1, 0.1, 0.1, 0])


def test_counts_are_places_on_the_curve() -> None:
    counted = divergences_of({"visual_tokens": (9, 4)}, {"visual_tokens": [[1.0], [2.0]]}, COUNTS[:1], dims_of(8))
    expected = np.interp(range(4, 13), [4, 9, 12], [2.0, 1.0, 0.0])
    np.testing.assert_allclose(curve(counted, "visual_tokens")[4:], expected)


def test_more_tokens_than_there_are_is_all_of_them() -> None:
    counted = divergences_of({"visual_tokens": (20, 4)}, {"visual_tokens": [[0.0], [2.0]]}, COUNTS[:1], dims_of(8))
    expected = np.interp(range(4, 13), [4, 12], [2.0, 0.0])
    np.testing.assert_allclose(curve(counted, "visual_tokens")[4:], expected)


def test_an_axis_that_was_not_measured_is_named() -> None:
    with pytest.raises(ValueError, match="axis 'mlp_depth' was not measured; these divergences have mha_depth"):
        curve(GIVEN, "mlp_depth")
