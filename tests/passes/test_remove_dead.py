"""Operations that reach no requested row and no stored key or value go; all others stay."""

from __future__ import annotations

import pytest
import torch

from dop_compile import Policy
from dop_compile.errors import PassError
from dop_compile.passes import run_passes
from dop_compile.passes.annotate import ANNOTATE
from dop_compile.passes.remove_dead import REMOVE_DEAD
from dop_compile.passes.slice_operations import SLICE_OPERATIONS
from tests.passes.graphs import (
    LAYERS,
    SHARING_LAYERS,
    build,
    codes_of,
    kv_only_from,
    run_graph,
    sharing_decoder,
    up_to,
)

TEXT_ONLY = frozenset({"text"})
NEVER_KEYS_FROM_2 = Policy.depthwise(LAYERS, mha_key_value_depth=2)


def _sets(policy: Policy, **arguments: object) -> dict[str, tuple[str, str]]:
    graph = build(policy, [ANNOTATE, REMOVE_DEAD], **arguments)  # type: ignore[arg-type]
    return {block.name: (str(block.tokens), str(block.keys)) for block in graph.blocks}


def test_all_rows_requested_keeps_everything() -> None:
    graph = build(kv_only_from(2), [ANNOTATE, REMOVE_DEAD])
    assert graph.reports[-1].rewritten == 0
    assert len(graph.reports[-1].kept) == 2 * LAYERS


def test_updates_after_the_last_reader_go() -> None:
    sets = _sets(NEVER_KEYS_FROM_2, requested=TEXT_ONLY)
    # Layer 1 still reads visual keys, so layer 0 must update visual tokens; after that nobody looks at them
    assert sets["L00_mlp"] == ("all", "none")
    assert sets["L01_mha"] == ("system_text", "all")
    assert sets["L01_mlp"] == ("system_text", "none")
    assert sets["L03_mha"] == ("requested", "system_text")
    assert sets["L03_mlp"] == ("requested", "none")


def test_without_a_cache_keys_nobody_reads_go() -> None:
    no_text_queries = Policy.from_operations(LAYERS, [("text", 3, "mha_query")])
    arguments = {"requested": TEXT_ONLY}
    assert _sets(no_text_queries, cached=True, **arguments)["L03_mha"] == ("none", "all")
    assert _sets(no_text_queries, cached=False, **arguments)["L03_mha"] == ("none", "none")


@pytest.mark.parametrize("cached", [True, False])
def test_dense_policy_keeps_the_last_layer_to_requested_rows(cached: bool) -> None:
    sets = _sets(Policy.full(LAYERS), requested=TEXT_ONLY, cached=cached)
    assert sets["L02_mlp"] == ("all", "none")
    assert sets["L03_mha"] == ("requested", "all")


@pytest.mark.parametrize("policy", [Policy.full(LAYERS), kv_only_from(1), NEVER_KEYS_FROM_2, kv_only_from(0)])
@pytest.mark.parametrize("cached", [True, False])
def test_requested_rows_do_not_change(policy: Policy, cached: bool) -> None:
    codes = codes_of("ssvvvvtt", ".svvvttt")
    arguments = {"requested": TEXT_ONLY, "cached": cached}
    without, _ = run_graph(build(policy, disable=["remove_dead"], **arguments), codes, last_rows=1)
    removed, cache = run_graph(build(policy, **arguments), codes, last_rows=1)
    torch.testing.assert_close(removed, without, rtol=1e-5, atol=1e-5)
    assert (cache is not None) == cached


@pytest.mark.parametrize("cached", [True, False])
def test_where_layers_supply_no_keys_only_requested_rows_are_live(cached: bool) -> None:
    graph = build(
        Policy.full(SHARING_LAYERS),
        [ANNOTATE, REMOVE_DEAD],
        model=sharing_decoder(),
        requested=TEXT_ONLY,
        cached=cached,
    )
    sets = {block.name: (str(block.tokens), str(block.keys), str(block.supplies)) for block in graph.blocks}
    assert sets["L01_mha"] == ("all", "all", "all")
    assert sets["L01_mlp"] == ("all", "none", "none")
    assert sets["L02_mha"] == ("requested", "all", "all")  # the last that computes keys and values
    for layer in range(3, SHARING_LAYERS):
        assert sets[f"L{layer:02d}_mha"] == ("requested", "all", "none")
        assert sets[f"L{layer:02d}_mlp"] == ("requested", "none", "none")


def test_keys_that_no_reader_sees_either_go() -> None:
    # Layer 1 itself keeps none of the visual keys, and only layer 5, which updates nothing, would read them
    pruned = [("visual", layer, "mha_key_value") for layer in (1, 3)] + [("text", 5, "mha_query")]
    policy = Policy.from_operations(SHARING_LAYERS, [*pruned, ("visual", 5, "mha_query"), ("system", 5, "mha_query")])
    arguments = {"model": sharing_decoder(), "requested": TEXT_ONLY}
    supplied = {cached: _supplied(policy, cached=cached, **arguments)["L01_mha"] for cached in (True, False)}
    assert supplied == {True: "all", False: "system_text"}  # generated tokens may read them


def _supplied(policy: Policy, **arguments: object) -> dict[str, str]:
    graph = build(policy, [ANNOTATE, REMOVE_DEAD], **arguments)  # type: ignore[arg-type]
    return {block.name: str(block.supplies) for block in graph.blocks}


def test_after_slicing_it_is_refused() -> None:
    graph = build(Policy.full(LAYERS), [ANNOTATE, SLICE_OPERATIONS])
    with pytest.raises(PassError, match="must run before slice_operations"):
        run_passes(graph, [REMOVE_DEAD])


def test_twice_is_refused() -> None:
    graph = build(Policy.full(LAYERS), up_to(REMOVE_DEAD))
    with pytest.raises(PassError, match="already run"):
        run_passes(graph, [REMOVE_DEAD])
