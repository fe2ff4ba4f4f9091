"""Blocks are found by structure in every family, and graphs without them are refused."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from transformers import MptConfig, MptModel

from dop_compile import Policy
from dop_compile.errors import PassError, UnsupportedModelError
from dop_compile.passes import dump, run_passes
from dop_compile.passes.annotate import ANNOTATE
from dop_compile.passes.blocks import MHA, MLP
from dop_compile.passes.graph import DecoderGraph
from dop_compile.passes.slice_operations import SLICE_OPERATIONS
from dop_compile.tracing.trace import DecoderInputs, trace_decoder
from tests.families import FAMILIES
from tests.passes.graphs import LAYERS, SHARING_LAYERS, build, decoder, kv_only_from, sharing_decoder

FULL = Policy.full(LAYERS)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_has_one_attention_and_one_mlp_block(name: str) -> None:
    layers = FAMILIES[name].num_layers
    graph = build(Policy.full(layers), [ANNOTATE], model=decoder(name))
    for kind in (MHA, MLP):
        assert [block.layer for block in graph.blocks if block.kind == kind] == list(range(layers))
    assert all(block.attention is not None and block.update is not None for block in graph.blocks if block.kind == MHA)


def test_parallel_branches_share_one_junction() -> None:
    parallel = build(FULL, [ANNOTATE], model=decoder("cohere2_vision"))
    sequential = build(FULL, [ANNOTATE])
    assert [len(junction.blocks) for junction in parallel.junctions] == [2] * LAYERS
    assert [len(junction.blocks) for junction in sequential.junctions] == [1] * 2 * LAYERS


def test_deepstack_is_a_token_wise_transform() -> None:
    inputs = DecoderInputs(position_rows=4, packed=2)
    base = build(FULL, [ANNOTATE], model=decoder("qwen3_vl"))
    graph = DecoderGraph(trace_decoder(decoder("qwen3_vl"), inputs), base.keep, base.universe, True)
    run_passes(graph, [ANNOTATE])
    transforms = [junction for junction in graph.junctions if not junction.blocks]
    assert [junction.token_wise for junction in transforms] == [True, True]
    assert sum("replaces the residual stream" in reason for reason in graph.reports[0].kept) == 2


def test_sets_come_from_the_keep_table() -> None:
    graph = build(kv_only_from(2), [ANNOTATE])
    sets = {block.name: (str(block.tokens), str(block.keys)) for block in graph.blocks}
    assert sets["L01_mha"] == ("all", "all")
    assert sets["L02_mha"] == ("system_text", "all")
    assert sets["L02_mlp"] == ("system_text", "none")


@pytest.mark.parametrize("cached", [True, False])
def test_readers_of_earlier_keys_name_their_source(cached: bool) -> None:
    pruned = [("visual", 1, "mha_key_value"), ("visual", 3, "mha_key_value"), ("system", 1, "mha_key_value")]
    policy = Policy.from_operations(SHARING_LAYERS, [*pruned, ("text", 2, "mha_key_value")])
    graph = build(policy, [ANNOTATE], model=sharing_decoder(), cached=cached)
    found = {block.layer: block for block in graph.blocks if block.kind == MHA}
    sources = {layer: block.source.layer for layer, block in found.items() if block.source is not None}
    assert sources == graph.traced.sources == {3: 1, 4: 2, 5: 1}
    assert str(found[1].keys) == "text"
    assert str(found[1].supplies) == "all"  # layer 5 sees what layers 1 and 3 do not
    assert str(found[3].keys) == "system_text"
    assert not any(found[layer].supplies for layer in sources)
    assert str(found[3].held) == "all"


def test_keys_made_of_earlier_ones_are_refused() -> None:
    graph = build(Policy.full(SHARING_LAYERS), [], model=sharing_decoder())
    kernel = next(n for n in graph.graph.nodes if n.meta.get("attention") and graph.traced.layer_of(n) == 3)
    with graph.graph.inserting_before(kernel):
        made = graph.call(torch.neg, (kernel.args[2],), name="made", like=kernel.args[2], layer=3)
    kernel.update_arg(2, made)
    with pytest.raises(PassError, match="made of those of an earlier layer") as caught:
        run_passes(graph, [ANNOTATE])
    assert caught.value.layer == 3


def test_rotary_tables_are_unpacked_once() -> None:
    graph = build(FULL, [ANNOTATE])
    tables = [node for node in graph.graph.nodes if node.op == "call_module" and "rotary" in str(node.target)]
    (table,) = tables
    assert len(table.users) == 2, "cos and sin"
    assert all(len(half.users) == 1 for half in table.users)


def test_masks_follow_the_cache_of_the_reduced_sequence() -> None:
    with_cache, without = build(FULL, [ANNOTATE]), build(FULL, [ANNOTATE], cached=False)
    assert "=cache_view" in dump(with_cache.graph)
    assert "cache_view" not in dump(without.graph)


def test_a_stream_without_additions_is_refused() -> None:
    graph = _traced()
    for node in graph.graph.nodes:
        if node.target in (torch.add,) or getattr(node.target, "__name__", "") == "add":
            node.target = torch.sub
    with pytest.raises(PassError, match="no addition to a residual stream") as caught:
        run_passes(graph, [ANNOTATE])
    assert caught.value.pass_name == "annotate"


def test_a_constant_added_to_the_stream_names_layer_and_node() -> None:
    graph = _traced()
    last = [node for node in graph.graph.nodes if node.name.startswith("add")][-1]
    last.args = (last.args[0], 1.0)
    with pytest.raises(PassError, match=r"adds the constant 1\.0") as caught:
        run_passes(graph, [ANNOTATE])
    assert (caught.value.layer, caught.value.node) == (LAYERS - 1, last.name)


def test_a_layer_without_attention_is_refused() -> None:
    graph = _traced()
    for node in graph.graph.nodes:
        if node.meta.get("attention") and graph.traced.layer_of(node) == 2:
            del node.meta["attention"]
    with pytest.raises(PassError, match=r"layers \[2\] have no attention branch"):
        run_passes(graph, [ANNOTATE])


def test_a_decoder_that_does_not_use_the_attention_interface_is_refused() -> None:
    config = MptConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=128)
    config.num_hidden_layers = 2
    with pytest.raises(UnsupportedModelError, match="attention interface"):
        trace_decoder(MptModel(config))


def test_twice_before_slicing_is_refused_and_after_slicing_too() -> None:
    graph = build(FULL, [ANNOTATE])
    with pytest.raises(PassError, match="already run"):
        run_passes(graph, [ANNOTATE])
    run_passes(graph, [SLICE_OPERATIONS])
    with pytest.raises(PassError, match="must run before slice_operations"):
        run_passes(graph, [ANNOTATE])


def _traced() -> DecoderGraph:
    base = build(FULL, [])
    assert isinstance(base.graph, fx.Graph)
    assert isinstance(base.traced.root, nn.Module)
    return base
