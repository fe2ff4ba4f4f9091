"""Points on the axes: DOP Table 6 row by row, any other depth, given points, and the policies they stand for."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dop_compile import Policy
from dop_compile.search.axes import (
    AXES,
    DEPTH_AXES,
    DOP_AXES,
    SPLIT_AXES,
    axis_policy,
    check_points,
    default_points,
    tokens_kept,
)

SHALLOW, DEEP, QWEN = [26, 20, 14, 8, 4, 0], [32, 24, 16, 8, 4, 0], [23, 18, 13, 8, 4, 0]
LLAVA, NEXT = [512, 256, 128, 64, 32, 16], [2560, 1280, 640, 320, 160, 80]


@pytest.mark.parametrize(
    ("layers", "visual", "depths", "tokens"),
    [
        pytest.param(32, 576, SHALLOW, LLAVA, id="LLaVA-1.5-7B"),
        pytest.param(40, 576, DEEP, LLAVA, id="LLaVA-1.5-13B"),
        pytest.param(32, 2880, SHALLOW, NEXT, id="LLaVA-NeXT-7B"),
        pytest.param(40, 2880, DEEP, NEXT, id="LLaVA-NeXT-13B"),
        pytest.param(28, 1296, QWEN, None, id="Qwen2.5-VL-7B"),
    ],
)
def test_defaults_are_the_papers_table(layers: int, visual: int, depths: list[int], tokens: list[int] | None) -> None:
    for axis in DEPTH_AXES:
        assert list(default_points(axis, layers)) == depths
    if tokens is not None:
        assert [tokens_kept(point, visual) for point in default_points("visual_tokens", layers)] == tokens


@pytest.mark.parametrize("layers", [*range(1, 49), 64, 80, 126])
def test_any_depth_has_valid_points(layers: int) -> None:
    depths = default_points("mha_depth", layers)
    assert depths[-1] == 0
    assert all(high > low for high, low in itertools.pairwise(depths))
    assert all(isinstance(depth, int) and 0 <= depth < layers for depth in depths)
    if layers not in (28, 40):
        # No point is further than rounding from one of the table's, and none of those is left out
        scaled = [depth * layers / 32 for depth in SHALLOW]
        assert all(min(abs(depth - wanted) for wanted in scaled) <= 0.5 for depth in depths)
        assert all(min(abs(depth - wanted) for depth in (*depths, layers)) <= 0.5 for wanted in scaled)
    assert check_points(None, AXES, layers) == {axis: default_points(axis, layers) for axis in AXES}


def test_the_axes_of_the_spaces() -> None:
    assert set(DOP_AXES) == {"mha_depth", "mlp_depth", "visual_tokens"}
    assert set(SPLIT_AXES) - set(DOP_AXES) == {"mha_query_depth"}
    assert set(SPLIT_AXES) < set(AXES)


def test_given_points_are_put_in_order_without_the_full_value() -> None:
    given_points = {"mha_depth": [0, 4, 2, 2, np.int64(3)], "visual_tokens": (0.25, 1.0, 0, 0.75)}
    with pytest.raises(TypeError, match=r"points\['visual_tokens'\]: expected fractions or counts, not both"):
        check_points(given_points, DOP_AXES, 4)
    given_points["visual_tokens"] = (0.25, 1.0, 0.0, 0.75)
    found = check_points(given_points, DOP_AXES, 4)
    assert found == {
        "mha_depth": (3, 2, 0),
        "mlp_depth": default_points("mlp_depth", 4),
        "visual_tokens": (0.75, 0.25, 0.0),
    }
    assert list(found) == list(DOP_AXES)


def test_one_token_is_a_count_and_not_everything() -> None:
    assert check_points({"visual_tokens": [2, 1, np.int64(9)]}, ["visual_tokens"], 4) == {"visual_tokens": (9, 2, 1)}
    found = check_points({"visual_tokens": [1, 0]}, ["visual_tokens"], 4)["visual_tokens"]
    assert [type(point) for point in found] == [int, int]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ({"mlp_dept": [0]}, r"points: .*'mlp_dept'; did you mean 'mlp_depth'"),
        ({"mha_query_depth": [0]}, r"points: expected one of mha_depth, mlp_depth, visual_tokens, got"),
        ({"mha_depth": []}, r"points\['mha_depth'\]: expected at least one point below the full value, got \[\]"),
        ({"mha_depth": [4]}, r"points\['mha_depth'\]: expected at least one point .*got \[4\]"),
        ({"visual_tokens": [1.0]}, r"points\['visual_tokens'\]: expected at least one point"),
        ({"mha_depth": [5]}, r"points\['mha_depth'\]: .*from 0 to 4, got 5"),
        ({"mha_depth": [-1]}, r"points\['mha_depth'\]: .*got -1"),
        ({"mlp_depth": [0.5]}, r"points\['mlp_depth'\]: .*got 0\.5"),
        ({"mlp_depth": [True]}, r"points\['mlp_depth'\]: .*got True"),
        ({"mlp_depth": 3}, r"points\['mlp_depth'\]: expected a list of points, got 3"),
        ({"mlp_depth": "012"}, r"points\['mlp_depth'\]: expected a list of points, got '012'"),
        (
            {"visual_tokens": [1.5]},
            r"points\['visual_tokens'\]: expected a fraction from 0 to 1, or a count .*got 1\.5",
        ),
        ({"visual_tokens": [-0.5]}, r"points\['visual_tokens'\]: .*got -0\.5"),
        ({"visual_tokens": [-2]}, r"points\['visual_tokens'\]: .*got -2"),
        ({"visual_tokens": [float("nan")]}, r"points\['visual_tokens'\]: .*finite.*got nan"),
        ({"visual_tokens": ["all"]}, r"points\['visual_tokens'\]: .*got 'all'"),
    ],
)
def test_wrong_points_are_named(points: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        check_points(points, DOP_AXES, 4)


def test_an_unknown_axis_has_no_points() -> None:
    with pytest.raises(ValueError, match=r"axis: .*did you mean 'mha_depth'"):
        default_points("mha_deph", 4)


@given(st.floats(0, 1), st.integers(0, 500))
def test_a_fraction_keeps_the_nearest_number_of_tokens(fraction: float, visual: int) -> None:
    kept = tokens_kept(fraction, visual)
    assert abs(kept - fraction * visual) <= 0.5
    assert kept >= fraction * visual or kept + 0.5 > fraction * visual, "halves are rounded up"


@given(st.integers(0, 40), st.integers(0, 30))
def test_a_count_keeps_what_there_is(count: int, visual: int) -> None:
    assert tokens_kept(count, visual) == (count if count < visual else visual)


# What each axis prunes from a depth on
PRUNES = {
    "mha_depth": [("visual", "mha_query"), ("visual", "mha_key_value")],
    "mlp_depth": [("visual", "mlp")],
    "mha_query_depth": [("visual", "mha_query")],
    "mha_key_value_depth": [("visual", "mha_key_value")],
    "system_mha_depth": [("system", "mha_query"), ("system", "mha_key_value")],
    "system_mlp_depth": [("system", "mlp")],
}


@given(st.sampled_from(DEPTH_AXES), st.integers(0, 4))
def test_a_depth_prunes_its_operations_and_no_others(axis: str, depth: int) -> None:
    base = Policy.full(4).replace(reducer="random", reducer_options={"seed": 3}, positions="compact")
    policy = axis_policy(axis, depth, 9, base)
    assert {tuple(operation) for operation in policy.pruned} == {
        (group, layer, module) for group, module in PRUNES[axis] for layer in range(depth, 4)
    }
    assert policy.replace(pruned=frozenset()) == base


def test_a_point_of_the_token_axis_keeps_that_share_of_each_sample() -> None:
    base = Policy.full(4).replace(reducer="random")
    assert axis_policy("visual_tokens", 0.5, 9, base) == base.replace(visual_tokens=5)
    assert axis_policy("visual_tokens", 0.5, 4, base) == base.replace(visual_tokens=2)
    assert axis_policy("visual_tokens", 6, 9, base) == base.replace(visual_tokens=6)
    assert axis_policy("visual_tokens", 6, 4, base) == base.replace(visual_tokens=4)
