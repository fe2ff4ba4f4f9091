"""The pass machinery: order, disabling, reports, the canonical text, and clean-up."""

from __future__ import annotations

import operator
import re

import pytest
import torch
from torch import fx

from dop_compile import Policy, ops
from dop_compile.passes import PIPELINE, describe_passes, dump, run_passes
from dop_compile.passes.annotate import ANNOTATE
from dop_compile.passes.cleanup import eliminate_dead_nodes, eliminate_duplicates
from dop_compile.passes.dump import diff_dumps
from dop_compile.passes.slice_operations import SLICE_OPERATIONS
from tests.passes.graphs import LAYERS, build, kv_only_from, report_of, up_to

NAMES = [item.name for item in PIPELINE]


def test_reports_have_a_line_per_pass_in_order() -> None:
    graph = build(kv_only_from(1))
    assert [report.name for report in graph.reports] == NAMES
    header = str(report_of(graph, SLICE_OPERATIONS))
    assert re.fullmatch(r"# 04 slice_operations \| 6 rewritten, 2 kept \| nodes \d+ -> \d+ \| \d+ ms", header)
    assert all(report.seconds > 0 and report.nodes_after > 0 for report in graph.reports)


def test_the_description_shows_changes_and_reasons() -> None:
    text = describe_passes(build(kv_only_from(1), diff=True)).splitlines()
    assert [line for line in text if line.startswith("#")] == [
        line for line in text if re.match(r"# 0\d (" + "|".join(NAMES) + r") \|", line)
    ]
    assert "kept L00_mha: every token takes part" in text
    assert "+ L03_mlp_slice : [B, system_text, 64] = token_slice(L03_mha_out, gather_system_text_in_all)" in text
    assert "- L03_mlp_slice : [B, system_text, 64] = token_slice(L03_mha_out, gather_system_text_in_all)" in text
    assert text[-1] == "unchanged"


@pytest.mark.parametrize("name", ["remove_dead", "narrow_residual", "share_frozen"])
def test_optional_passes_can_be_disabled(name: str) -> None:
    graph = build(kv_only_from(1), disable=[name], requested=frozenset({"text"}))
    assert [report.name for report in graph.reports] == [other for other in NAMES if other != name]


@pytest.mark.parametrize("name", ["annotate", "resume", "slice_operations", "verify", "nonsense"])
def test_other_passes_cannot(name: str) -> None:
    with pytest.raises(ValueError, match="choose from remove_dead, narrow_residual, share_frozen"):
        build(kv_only_from(1), disable=[name])


def test_the_pipeline_in_two_steps_is_the_pipeline() -> None:
    first = up_to(SLICE_OPERATIONS)
    whole, steps = build(kv_only_from(1)), build(kv_only_from(1), first)
    run_passes(steps, PIPELINE[len(first) :])
    assert dump(steps.graph) == dump(whole.graph)
    assert [report.number for report in steps.reports] == list(range(1, len(PIPELINE) + 1))


def test_the_dump_is_the_same_for_the_same_policy() -> None:
    assert dump(build(kv_only_from(1)).graph) == dump(build(kv_only_from(1)).graph)


def test_dump_shows_sizes_sets_and_arguments() -> None:
    lines = dump(build(Policy.full(LAYERS), [ANNOTATE]).graph).splitlines()
    assert lines[0] == "inputs_embeds : [B, T, 64] = input"
    assert "getitem_3 : [B, 4, T, 8] = getitem(transpose, (..., 8:))" in lines
    assert lines[-1].startswith("output : output(")
    names = [line.partition(" ")[0] for line in lines]
    assert len(set(names)) == len(names)


def test_diff_of_dumps() -> None:
    assert diff_dumps("a : f(x)\nb : g(a)", "b : g(x)\nc : h(b)") == "- a : f(x)\n~ b : g(x)\n+ c : h(b)"
    assert diff_dumps("a : f(x)", "a : f(x)") == "unchanged"


def _graph_of(*calls: tuple[object, tuple[object, ...], dict[str, object]]) -> tuple[fx.Graph, list[fx.Node]]:
    graph = fx.Graph()
    x = graph.placeholder("x")
    nodes = [graph.call_function(target, (x, *args), kwargs) for target, args, kwargs in calls]  # type: ignore[arg-type]
    graph.output(tuple(nodes))
    return graph, nodes


@pytest.mark.parametrize(
    ("first", "second", "merged"),
    [
        ((operator.mul, (2,), {}), (operator.mul, (2,), {}), 1),
        ((operator.mul, (2,), {}), (operator.mul, (2.0,), {}), 0),
        ((operator.getitem, (True,), {}), (operator.getitem, (1,), {}), 0),
        ((operator.getitem, (slice(1, 2),), {}), (operator.getitem, (slice(1, 2),), {}), 1),
        ((operator.getitem, (slice(1, 2),), {}), (operator.getitem, (slice(1, 3),), {}), 0),
        ((torch.mean, (-1,), {"keepdim": True}), (torch.mean, (-1,), {"keepdim": True}), 1),
        ((torch.mean, (-1,), {"keepdim": True}), (torch.mean, (-1,), {"keepdim": False}), 0),
        ((torch.nn.functional.dropout, (0.5,), {}), (torch.nn.functional.dropout, (0.5,), {}), 0),
        ((torch.rand_like, (), {}), (torch.rand_like, (), {}), 0),
        ((torch.relu_, (), {}), (torch.relu_, (), {}), 0),
        ((ops.update_cache, (1, 2), {}), (ops.update_cache, (1, 2), {}), 0),
    ],
)
def test_duplicates_merge_only_if_they_must_be_equal(first: tuple, second: tuple, merged: int) -> None:
    graph, _ = _graph_of(first, second)
    assert eliminate_duplicates(graph) == merged
    assert (graph.output_node().args[0][0] is graph.output_node().args[0][1]) == bool(merged)  # type: ignore[index]
    assert eliminate_duplicates(graph) == 0, "twice is the same as once"


def test_effects_and_kernels_are_never_merged() -> None:
    for mark in ("effect", "attention"):
        graph, nodes = _graph_of((operator.mul, (2,), {}), (operator.mul, (2,), {}))
        for node in nodes:
            node.meta[mark] = True
        assert eliminate_duplicates(graph) == 0


def test_modules_that_may_drop_out_are_not_merged() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_module("m", (x,)), graph.call_module("m", (x,))))
    assert eliminate_duplicates(graph, training=True) == 0
    assert eliminate_duplicates(graph) == 1


def test_duplicates_of_duplicates_merge_in_one_go() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(tuple(graph.call_function(operator.neg, (graph.call_function(operator.mul, (x, 2)),)) for _ in "ab"))
    assert eliminate_duplicates(graph) == 2


def test_dead_nodes_go_with_what_only_they_need_and_effects_stay() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    dead = graph.call_function(operator.mul, (x, 2))
    graph.call_function(operator.neg, (dead,))
    stored = graph.call_function(operator.mul, (x, 3))
    graph.call_function(operator.neg, (stored,)).meta["effect"] = True
    graph.output(x)
    assert eliminate_dead_nodes(graph) == 2
    assert stored in set(graph.nodes)
    assert eliminate_dead_nodes(graph) == 0
