"""A graph that begins at a later layer: what went, what stayed, and that the numbers are the whole graph's."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GraniteConfig, GraniteModel

from dop_compile import Policy
from dop_compile.errors import PassError
from dop_compile.passes import PIPELINE, DecoderGraph, check_graph, dump, run_passes
from dop_compile.passes.annotate import ANNOTATE
from dop_compile.passes.resume import RESUME
from dop_compile.policy.keep import KeepTable
from dop_compile.tokens import Universe
from dop_compile.tracing.trace import DecoderInputs, trace_decoder
from tests.drawing import examples
from tests.families import FAMILIES
from tests.passes.graphs import (
    GROUPS,
    LAYERS,
    SHARING_LAYERS,
    calls_of,
    codes_of,
    decoder,
    kv_only_from,
    run_graph,
    sharing_decoder,
)
from tests.strategies import policies

CODES = codes_of("ssvvvvtt", "..vvtttt")


def graph_from(
    first: int,
    policy: Policy | None = None,
    *,
    name: str = "llama",
    cached: bool = False,
    packed: int = 0,
    model: nn.Module | None = None,
) -> DecoderGraph:
    """A traced decoder that is to begin at a layer; no pass has run."""
    family = FAMILIES[name]
    model = decoder(name) if model is None else model
    keep = KeepTable.from_policy(policy or Policy.full(family.num_layers), GROUPS)
    rows = 3 if family.has_mrope else None
    inputs = DecoderInputs(cached=cached, first_layer=first, packed=packed, position_rows=rows)
    return DecoderGraph(trace_decoder(model, inputs), keep, Universe(keep.groups), cached)


def resumed(first: int, policy: Policy | None = None, name: str = "llama", packed: int = 0) -> DecoderGraph:
    return run_passes(graph_from(first, policy, name=name, packed=packed), [ANNOTATE, RESUME], check=check_graph)


def layers_in(text: str) -> set[int]:
    return {int(number) for number in re.findall(r"decoder\.layers\.(\d+)\.", text)}


def test_all_before_the_layer_goes_and_the_rest_stays() -> None:
    whole, later = dump(resumed(0).graph), dump(resumed(2).graph)
    assert layers_in(whole) == {0, 1, 2, 3}
    assert layers_in(later) == {2, 3}
    # What stays is as it was, but for the stream and the first reads of it
    lines = set(whole.splitlines())
    new = [line for line in later.splitlines() if line not in lines]
    assert len(new) == 3
    assert all("residual_stream" in line for line in new)
    assert "decoder.layers.2.input_layernorm(residual_stream)" in new[1]


def test_what_every_layer_shares_stays() -> None:
    graph = resumed(LAYERS - 1)
    text = dump(graph.graph)
    for needed in ("decoder.rotary_emb(", "create_causal_mask(", "decoder.norm("):
        assert needed in text
    assert layers_in(text) == {LAYERS - 1}


def test_blocks_and_reports_begin_at_the_layer() -> None:
    graph = resumed(2)
    assert [block.name for block in graph.blocks] == ["L02_mha", "L02_mlp", "L03_mha", "L03_mlp"]
    assert graph.reports[-1].rewritten == 4, "two blocks of two layers went"
    assert graph.entry is not None
    assert graph.entry.name == "residual_stream"
    assert graph.junctions[0].stream is graph.entry


def test_from_the_first_layer_nothing_changes() -> None:
    before = run_passes(graph_from(0), [ANNOTATE])
    text = dump(before.graph)
    run_passes(before, [RESUME])
    assert dump(before.graph) == text
    assert before.reports[-1].rewritten == 0


def test_deepstack_before_the_layer_goes_with_it() -> None:
    """Qwen3-VL adds visual features to the stream after its first two layers."""
    whole, second, third = (resumed(first, name="qwen3_vl", packed=2) for first in (0, 1, 2))
    transforms = [[j.out.name for j in graph.junctions if not j.blocks] for graph in (whole, second, third)]
    assert [len(names) for names in transforms] == [2, 1, 0]
    assert transforms[1] == transforms[0][1:]
    assert "packed_1" not in {node.name for node in third.graph.nodes if node.users}


def test_embeddings_that_are_scaled_once_are_not_scaled_again() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = GraniteModel(GraniteConfig(vocab_size=32, embedding_multiplier=12.0, **sizes)).eval()
    codes = codes_of("ssvvvvtt")
    graph = run_passes(graph_from(2, model=model), PIPELINE, check=check_graph)
    assert graph.entry is not None
    assert graph.entry.name == "residual_stream"
    assert "decoder.layers.2.input_layernorm(residual_stream)" in dump(graph.graph)
    found, _ = run_graph(graph, codes)
    torch.testing.assert_close(found, layers_from(model, 2, codes))


def layers_from(model: nn.Module, first: int, codes: Tensor) -> Tensor:
    """What Hugging Face's own layers and norm make of the random stream of `run_graph`."""
    stream = torch.randn(*codes.shape, 64, generator=torch.Generator().manual_seed(0))
    tables = model.rotary_emb(stream, torch.arange(codes.shape[1])[None])
    with torch.no_grad():
        for layer in model.layers[first:]:
            stream = layer(stream, attention_mask=None, position_embeddings=tables)
            stream = stream[0] if isinstance(stream, tuple) else stream
        return model.norm(stream)


def test_a_parallel_block_is_one_junction() -> None:
    graph = resumed(3, name="cohere2_vision")
    assert [block.name for block in graph.blocks] == ["L03_mha", "L03_mlp"]
    assert len(graph.junctions) == 1


@examples(12)
@given(policies(LAYERS, reduction=False), st.integers(1, LAYERS - 1))
def test_the_rest_computes_what_the_whole_computes_from_that_stream(policy: Policy, first: int) -> None:
    """A whole graph whose first layers do nothing hands its input on to the later ones."""
    skipped = [(group, layer, module) for group in GROUPS for layer in range(first) for module in ("mha", "mlp")]
    later = {operation for operation in policy.pruned if operation.layer >= first}
    idle = Policy.from_operations(LAYERS, [*skipped, *later])
    whole = run_passes(graph_from(0, idle), PIPELINE, check=check_graph)
    rest = run_passes(graph_from(first, idle), PIPELINE, check=check_graph)
    expected, _ = run_graph(whole, CODES)
    found, _ = run_graph(rest, CODES)
    torch.testing.assert_close(found[CODES >= 0], expected[CODES >= 0], rtol=1e-5, atol=1e-5)


def test_an_unpruned_rest_is_bitwise_the_layers_themselves() -> None:
    codes = codes_of("ssvvvvtt")
    found, _ = run_graph(run_passes(graph_from(2), PIPELINE, check=check_graph), codes)
    assert torch.equal(found, layers_from(decoder(), 2, codes))


def test_pruning_is_that_of_the_layers_that_are_left() -> None:
    graph = run_passes(graph_from(2, kv_only_from(1)), PIPELINE, check=check_graph)
    assert [str(calls_of(graph, ".mlp", layer)[0].meta["tokens"]) for layer in (2, 3)] == ["system_text"] * 2
    assert {block.name: str(block.tokens) for block in graph.blocks} == {
        "L02_mha": "system_text", "L02_mlp": "system_text", "L03_mha": "system_text", "L03_mlp": "system_text",
    }  # fmt: skip


# --- refused


def test_a_cache_is_refused_for_it_would_miss_layers() -> None:
    with pytest.raises(PassError, match=r"pass 'resume', layer 2 .*a cache would miss the layers before layer 2"):
        run_passes(graph_from(2, cached=True), [ANNOTATE, RESUME])
    run_passes(graph_from(0, cached=True), [ANNOTATE, RESUME])


@pytest.mark.parametrize("first", [LAYERS, 99])
def test_a_layer_that_is_not_there_is_refused(first: int) -> None:
    with pytest.raises(PassError, match=f"there is no layer {first}; layers are numbered from 0"):
        run_passes(graph_from(first), [ANNOTATE, RESUME])


def test_its_place_is_before_anything_is_pruned() -> None:
    graph = run_passes(graph_from(1), PIPELINE[:1])
    run_passes(graph, [item for item in PIPELINE[1:] if item is not RESUME])
    with pytest.raises(PassError, match="must run before remove_dead, slice_operations"):
        run_passes(graph, [RESUME])
    with pytest.raises(PassError, match="needs annotate to run before it"):
        run_passes(graph_from(1), [RESUME])
    with pytest.raises(PassError, match="already run"):
        run_passes(resumed(1), [RESUME])
    with pytest.raises(ValueError, match="'resume' is not an optional pass"):
        run_passes(graph_from(1), PIPELINE, disable=["resume"])


@pytest.mark.parametrize("first", range(SHARING_LAYERS))
def test_it_begins_no_later_than_where_keys_are_read_from(first: int) -> None:
    policy = Policy.full(SHARING_LAYERS)
    keep = KeepTable.from_policy(policy, GROUPS)
    traced = trace_decoder(sharing_decoder(), DecoderInputs(cached=False, first_layer=first))
    graph = DecoderGraph(traced, keep, Universe(keep.groups), False)
    if first <= 1:
        assert layers_in(dump(run_passes(graph, [ANNOTATE, RESUME]).graph)) == set(range(first, SHARING_LAYERS))
        return
    with pytest.raises(PassError, match="read keys and values of earlier layers"):
        run_passes(graph, [ANNOTATE, RESUME])
