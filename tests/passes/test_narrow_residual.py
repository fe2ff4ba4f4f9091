"""Tokens leave the residual stream after the last operation that changes them; tokens are only moved."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dop_compile import Policy, ops
from dop_compile.errors import PassError
from dop_compile.passes import run_passes
from dop_compile.passes.annotate import ANNOTATE
from dop_compile.passes.narrow_residual import NARROW_RESIDUAL
from dop_compile.passes.remove_dead import REMOVE_DEAD
from dop_compile.passes.slice_operations import SLICE_OPERATIONS
from tests.drawing import examples
from tests.passes.graphs import LAYERS, build, calls_of, codes_of, kv_only_from, run_graph, targets, up_to
from tests.strategies import policies

SLICED = [ANNOTATE, REMOVE_DEAD, SLICE_OPERATIONS]
NARROWED = [*SLICED, NARROW_RESIDUAL]
TEXT_ONLY = frozenset({"text"})
CODES = codes_of("ssvvvvtt", "..vvtttt", ".svtvvtt")


def test_nothing_leaves_when_all_rows_are_requested_and_nothing_is_pruned() -> None:
    graph = build(Policy.full(LAYERS), NARROWED)
    assert graph.reports[-1].rewritten == 0
    assert targets(graph, ops.token_slice) == []


def test_tokens_nobody_reads_again_leave_for_good() -> None:
    """Visual tokens without keys from layer 2 on: after layer 1 has read them they are gone."""
    graph = build(Policy.depthwise(LAYERS, mha_depth=2, mlp_depth=2), NARROWED, requested=TEXT_ONLY)
    assert targets(graph, ops.token_merge) == []
    assert targets(graph, ops.token_add) == []
    out = next(node for node in graph.graph.nodes if node.name == "L03_mha_out")
    assert str(out.meta["tokens"]) == "requested"
    assert calls_of(graph, "input_layernorm", layer=2)[0].args[0].name == "L01_mlp_out"  # type: ignore[union-attr]


def test_tokens_that_only_supply_keys_stand_in_a_frozen_stream() -> None:
    graph = build(kv_only_from(1), NARROWED, requested=TEXT_ONLY)
    frozen = [node for node in graph.graph.nodes if node.meta.get("frozen")]
    assert [node.name for node in frozen] == ["frozen_visual"]
    assert len(targets(graph, ops.token_merge)) == LAYERS - 1
    assert targets(graph, ops.token_add) == []


def test_tokens_read_only_once_more_stay() -> None:
    graph = build(kv_only_from(LAYERS - 1), NARROWED, requested=TEXT_ONLY)
    assert not any(node.meta.get("frozen") for node in graph.graph.nodes)


def test_requested_rows_of_frozen_tokens_come_back_at_the_end() -> None:
    graph = build(kv_only_from(1), NARROWED)
    merged = targets(graph, ops.token_merge)[-1]
    assert [user.target for user in merged.users] == ["decoder.norm"]


def test_the_output_holds_requested_rows_only() -> None:
    hidden, _ = run_graph(build(Policy.full(LAYERS), NARROWED, requested=TEXT_ONLY), CODES, last_rows=2)
    assert hidden.shape == (3, 2, 64)


@examples(15)
@given(policies(LAYERS, reduction=False), st.sampled_from([None, TEXT_ONLY]), st.booleans())
def test_numbers_do_not_change(policy: Policy, requested: frozenset[str] | None, cached: bool) -> None:
    arguments = {"requested": requested, "cached": cached}
    last = 2 if requested else None
    whole = build(policy, SLICED, **arguments)
    expected, _ = run_graph(whole, CODES, last_rows=last)
    narrow, _ = run_graph(build(policy, NARROWED, **arguments), CODES, last_rows=last)
    if requested:
        expected = expected[:, -2:]
    valid = (CODES >= 0)[:, -expected.shape[1] :]
    torch.testing.assert_close(narrow[valid], expected[valid], rtol=1e-5, atol=1e-5)


def test_with_equal_row_counts_the_bits_are_equal() -> None:
    """Where no matrix product changes its rows, moving tokens changes nothing at all."""
    policy = kv_only_from(1)
    expected, _ = run_graph(build(policy, SLICED), CODES[:1])
    narrow, _ = run_graph(build(policy, NARROWED), CODES[:1])
    assert torch.equal(narrow, expected)


def test_it_can_be_disabled_and_does_not_run_out_of_order() -> None:
    graph = build(kv_only_from(1), disable=["narrow_residual"], requested=TEXT_ONLY)
    assert len(targets(graph, ops.token_add)) > 0
    with pytest.raises(PassError, match="must run before share_frozen"):
        run_passes(graph, [NARROW_RESIDUAL])
    with pytest.raises(PassError, match="already run"):
        run_passes(build(kv_only_from(1), up_to(NARROW_RESIDUAL)), [NARROW_RESIDUAL])
