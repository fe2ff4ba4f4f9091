"""Tokens by layer, module and group: as counted by hand, as `explain` sums them up, and as they are drawn."""

from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from dop_compile import Policy, dop_compile, explain
from dop_compile.policy.ranking import Ranking, Stage
from dop_compile.reports.executed import SampleTokens
from dop_compile.reports.operation_map import ABSENT, FROZEN, OperationMap
from dop_compile.reports.operation_picture import COLOURS, TRACK, TierPicture, draw_map, tiers_figure
from dop_compile.reports.picture import explain_figure
from tests.drawing import examples
from tests.families import FAMILIES, LAYERS
from tests.strategies import policies

COUNTS = {"system": 2, "visual": 6, "text": 4}


@functools.cache
def llama() -> Any:
    return FAMILIES["llama"].build()


def of_tier(policy: Policy, rows: int = 1, **counts: int) -> tuple[OperationMap, Any]:
    compiled = dop_compile(llama(), policy, backend="eager", token_groups=lambda ids: ids * 0)
    counts = COUNTS | counts
    found = OperationMap.of_tier(compiled.dop, "default", SampleTokens(**counts, rows=rows, use_cache=True))
    return found, explain(compiled, **counts, rows=rows)


# --- counts


def test_a_policy_is_counted_by_hand() -> None:
    joint = OperationMap.of_policy(
        Policy.depthwise(3, mha_depth=2, mlp_depth=1, visual_tokens=5), system=2, visual=6, text=4
    )
    assert (joint.groups, joint.before, len(joint)) == (("system", "visual", "text"), (2, 6, 4), 3)
    assert joint.kept[:, :, 1].tolist() == [[5, 5, 5], [5, 5, 0], [0, 0, 0]]
    assert joint.kept[:, :, [0, 2]].tolist() == [[[2, 4]] * 3] * 3
    assert joint.computed is None
    assert joint.processed is joint.kept
    # Fewer tokens than the policy lets in
    assert OperationMap.of_policy(Policy.full(2).replace(visual_tokens=9), visual=6).kept.tolist() == [[[6]] * 3] * 2
    # Parts of the visual group stand apart
    pruned = [("system", 0, "mlp"), ("visual_salient", 0, "mha_query"), ("visual_rest", 1, "mha")]
    parts = OperationMap.of_policy(
        Policy.from_operations(2, pruned, visual_tokens=40, salient_fraction=0.25), system=3, visual=144
    )
    assert (parts.groups, parts.before) == (("system", "visual_salient", "visual_rest"), (3, 36, 108))
    assert parts.kept.tolist() == [[[3, 0, 30], [3, 10, 30], [0, 10, 30]], [[3, 10, 0], [3, 10, 0], [3, 10, 30]]]
    # Tokens that a ranking drops are visual until they leave
    ranked = Policy.full(3).replace(ranking=Ranking("last_token", (Stage(0, tokens=4), Stage(1, tokens=1))))
    left = OperationMap.of_policy(ranked, visual=6, text=2)
    assert (left.groups, left.before) == (("visual", "text"), (6, 2))
    assert left.kept[:, :, 0].tolist() == [[6] * 3, [4] * 3, [1] * 3]
    with pytest.raises(ValueError, match="at least one token"):
        OperationMap.of_policy(Policy.full(2))


@examples(10)
@given(
    policy=policies(LAYERS, split=None, max_visual_tokens=8),
    visual=st.integers(0, 6),
    rows=st.sampled_from([0, 1, 3]),
)
def test_groups_add_up_to_what_explain_counts(policy: Policy, visual: int, rows: int) -> None:
    found, explained = of_tier(policy, rows, visual=visual)
    counted = [[layer.query, layer.key_value, layer.mlp] for layer in explained.layers]
    assert found.processed.sum(axis=2).tolist() == counted
    assert (found.processed <= found.kept).all()


def test_what_a_program_of_one_group_runs_is_told_apart() -> None:
    found, _ = of_tier(Policy.full(LAYERS))
    assert (found.processed[:-1] == found.kept[:-1]).all()
    assert found.processed[-1].tolist() == [[0, 0, 1], [2, 6, 4], [0, 0, 1]]


def test_states() -> None:
    found, _ = of_tier(Policy.depthwise(LAYERS, mha_query_depth=1, mha_key_value_depth=3, mlp_depth=1))
    assert [found.state(layer, "visual") for layer in range(LAYERS)] == ["", FROZEN, FROZEN, ABSENT]
    assert {found.state(layer, group) for layer in range(LAYERS) for group in ("system", "text")} == {""}
    # Queries of layer 1 are kept, but nobody reads them
    dead, _ = of_tier(Policy.depthwise(LAYERS, mha_depth=2, mlp_depth=1))
    assert dead.kept[1, :, 1].tolist() == [6, 6, 0]
    assert dead.processed[1, :, 1].tolist() == [0, 6, 0]
    assert [dead.state(layer, "visual") for layer in range(LAYERS)] == ["", FROZEN, ABSENT, ABSENT]


def test_equal_neighbours_are_one_run() -> None:
    found = OperationMap.of_policy(Policy.depthwise(6, mha_depth=4, mlp_depth=4), visual=3)
    assert found.runs() == [range(0, 4), range(4, 6)]
    assert found.runs([1, 1, 2, 2, 2, 2]) == [range(0, 2), range(2, 4), range(4, 6)]


# --- pictures


def bars(axes: Any, colour: str) -> Any:
    """(layers, columns) lengths of the bars of a colour."""
    found = [c for c in axes.containers if to_hex(c[0].get_facecolor()) == colour.lower() and not c[0].get_hatch()]
    return np.array([[bar.get_width() for bar in container] for container in found]).T


def test_bars_are_the_share_of_tokens() -> None:
    operations, _ = of_tier(Policy.depthwise(LAYERS, mha_depth=2, mlp_depth=1, visual_tokens=3))
    axes = Figure().subplots()
    draw_map(axes, operations)
    tracks = bars(axes, TRACK).reshape(LAYERS, 3, 3)
    for number, group in enumerate(operations.groups):
        share = bars(axes, COLOURS[group]) / tracks[:, :, number]
        assert np.allclose(share, operations.processed[:, :, number] / COUNTS[group])
    unread = [bar.get_width() for c in axes.containers if c[0].get_hatch() for bar in c]
    assert np.count_nonzero(unread) == ((operations.kept - operations.processed) > 0).sum() > 0
    words = [text.get_text() for text in axes.texts]
    assert {"queries", "keys/values", "MLP", "system\n2", "visual\n6", "text\n4"} <= set(words)
    assert {"visual frozen", "visual absent"} <= set(words)
    expected = sum((operations.processed[run[0]] > 0).sum() for run in operations.runs())
    assert sum(word.isdigit() for word in words) == expected
    assert axes.get_ylim() == (LAYERS - 0.5, -0.5)


def test_a_figure_has_a_panel_per_tier_and_the_costs_of_explain() -> None:
    tiers = {
        "100%": Policy.full(LAYERS),
        "a": Policy.depthwise(LAYERS, mha_depth=2, mlp_depth=1),
        "b": Policy.depthwise(LAYERS, visual_tokens=2),
        "c": Policy.depthwise(LAYERS, mha_query_depth=1),
    }
    compiled = dop_compile(llama(), tiers, backend="eager", token_groups=lambda ids: ids * 0)
    figure = explain_figure(compiled, **COUNTS)
    titles = [panel.get_suptitle() for panel in figure.subfigs if panel.get_suptitle()]
    costs = explain(compiled, **COUNTS).tiers
    assert [title.splitlines()[0] for title in titles] == list(tiers)
    for title, cost in zip(titles, costs, strict=True):
        assert f"executed FLOPs {100 * cost.executed_ratio:.1f} %" in title
    flops = [figure.subfigs[number].axes[1] for number in range(len(tiers))]
    for axes, name in zip(flops, tiers, strict=True):
        drawn = [bar.get_width() for bar in axes.containers[1]]
        assert drawn == [layer.flops for layer in explain(compiled, name, **COUNTS).layers]
    for kind, magic in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        file = io.BytesIO()
        figure.savefig(file, format=kind)
        assert file.getvalue().startswith(magic)


def test_a_figure_of_policies_alone_has_no_bars() -> None:
    operations = OperationMap.of_policy(Policy.depthwise(2, mha_depth=1), visual=3)
    figure = tiers_figure([TierPicture("one", operations)])
    assert [len(panel.axes) for panel in figure.subfigs] == [1]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert not any("no output" in label for label in labels)
