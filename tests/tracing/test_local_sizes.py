"""Numbers of tokens: a node takes them from its own tensors, and what counts tokens counts the whole sequence."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import fx

from dop_compile.tracing.local_sizes import localise_sizes
from dop_compile.tracing.trace import trace_decoder
from tests.conformance.text_only import text
from tests.support import (
    assert_forward_matches,
    assert_generates_reference,
    compile_eagerly,
    fixed_policies,
    make_batch,
)

# Llama 4 scales queries by where they stand, which each attention counts itself; every fourth token here
LLAMA4 = text("llama4_scaled", "Llama4ForCausalLM", attention_chunk_size=8, floor_scale=4)


def _counts(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target is torch.arange and node.all_input_nodes]


def test_what_a_layer_counts_is_the_whole_sequence() -> None:
    graph = trace_decoder(LLAMA4.build().get_decoder().model).graph
    localise_sizes(graph)
    counted = _counts(graph)
    assert counted
    for node in counted:
        sizes = [source for source in node.all_input_nodes if source.target == "size"]
        assert [size.args[0].name for size in sizes] == ["inputs_embeds"]


@pytest.mark.parametrize("policy_name", ["query_and_key_value_apart", "given_scattered"])
def test_pruned_queries_keep_their_scale(policy_name: str) -> None:
    # One row: padding on the left shifts the original's own scales
    batch = make_batch(LLAMA4, rows=[[("text", 14)]])
    groups = torch.tensor([[2, 2, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0]])
    batch = dataclasses.replace(batch, groups=groups)
    policy, kept = fixed_policies(batch)[policy_name]
    compiled = compile_eagerly(batch.model, policy)
    assert_forward_matches(compiled, batch, policy, kept)
    assert_generates_reference(compiled, batch, policy, kept)
