"""Each block computes for its own tokens: node counts, canonical text, boundaries, and numbers against hand-written
bypasses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Phi3Config, Phi3Model

from dop_compile import Policy, ops
from dop_compile.errors import PassError
from dop_compile.passes import dump, run_passes
from dop_compile.passes.annotate import ANNOTATE
from dop_compile.passes.graph import token_dims
from dop_compile.passes.slice_operations import SLICE_OPERATIONS
from tests.passes.graphs import LAYERS, build, calls_of, codes_of, decoder, kv_only_from, run_graph, targets

SLICED = [ANNOTATE, SLICE_OPERATIONS]


def test_nothing_to_prune_leaves_every_operation() -> None:
    before = build(Policy.full(LAYERS), [ANNOTATE], cached=False)
    after = build(Policy.full(LAYERS), SLICED, cached=False)
    assert dump(after.graph) == dump(before.graph)
    assert after.reports[-1].rewritten == 0
    assert after.reports[-1].kept[:2] == ["L00_mha: every token takes part", "L00_mlp: every token takes part"]


def test_the_projections_see_only_their_tokens() -> None:
    graph = build(kv_only_from(2), SLICED)
    tokens = {
        part: str(calls_of(graph, part, layer=2)[0].meta["tokens"])
        for part in ("input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj", "mlp")
    }
    assert tokens == {
        "input_layernorm": "all",
        "q_proj": "system_text",
        "k_proj": "all",
        "v_proj": "all",
        "o_proj": "system_text",
        "mlp": "system_text",
    }
    assert graph.reports[-1].rewritten == 4


def test_nodes_are_named_for_what_they_do() -> None:
    graph = build(kv_only_from(2), SLICED)
    names = {node.name for node in graph.graph.nodes}
    assert {"L02_mha_self_attn_q_proj", "L02_mha_attention", "L02_mha_out", "L02_mlp_slice", "L02_mlp_out"} <= names
    inserted = [node for node in graph.graph.nodes if node.meta.get("pass") == "slice_operations"]
    assert inserted
    assert all(graph.traced.layer_of(node) is not None for node in inserted if node.name.startswith("L"))


def test_canonical_text_of_a_sliced_mlp() -> None:
    text = dump(build(Policy.depthwise(LAYERS, mlp_depth=3), SLICED).graph)
    assert [line for line in text.splitlines() if line.startswith("L03_mlp")] == [
        "L03_mlp_slice : [B, system_text, 64] = token_slice(add_14, gather_system_text_in_all)",
        "L03_mlp_post_attention_layernorm : [B, system_text, 64] = "
        "decoder.layers.3.post_attention_layernorm(L03_mlp_slice)",
        "L03_mlp_mlp : [B, system_text, 64] = decoder.layers.3.mlp(L03_mlp_post_attention_layernorm)",
        "L03_mlp_out : [B, T, 64] = token_add(add_14, L03_mlp_mlp, scatter_system_text_in_all)",
    ]


def test_joint_queries_and_keys_share_one_slice() -> None:
    graph = build(Policy.depthwise(LAYERS, mha_depth=3), SLICED)
    (norm,) = calls_of(graph, "input_layernorm", layer=3)
    assert str(norm.meta["tokens"]) == "system_text"
    assert norm.args[0].name == "L03_mha_slice"  # type: ignore[union-attr]
    assert {str(node.meta["tokens"]) for node in calls_of(graph, "_proj", layer=3)} == {"system_text"}


def test_no_query_left_stores_keys_without_attention() -> None:
    everything = [(group, 2, "mha_query") for group in ("system", "visual", "text")]
    graph = build(Policy.from_operations(LAYERS, everything), SLICED)
    assert [len(calls_of(graph, part, layer=2)) for part in ("q_proj", "k_proj", "v_proj", "o_proj")] == [0, 1, 1, 0]
    assert len(targets(graph, ops.update_cache)) == LAYERS
    without = build(Policy.from_operations(LAYERS, everything), SLICED, cached=False)
    assert calls_of(without, "_proj", layer=2) == []


@pytest.mark.parametrize("depth", [0, 1, LAYERS])
@pytest.mark.parametrize("codes", ["ssvvvtt", "vvvv", "t", "vt"])
def test_depths_against_a_bypass_written_by_hand(depth: int, codes: str) -> None:
    graph = build(Policy.depthwise(LAYERS, mlp_depth=depth), SLICED, cached=False)
    hidden, _ = run_graph(graph, codes_of(codes))
    torch.testing.assert_close(hidden, _with_bypassed_mlp(codes_of(codes), depth), rtol=1e-5, atol=1e-5)


def test_everything_pruned_returns_the_norm_of_the_embeddings() -> None:
    pruned = [
        (group, layer, m)
        for group in ("system", "visual", "text")
        for layer in range(LAYERS)
        for m in ("mha_query", "mha_key_value", "mlp")
    ]
    graph = build(Policy.from_operations(LAYERS, pruned), SLICED, cached=False)
    hidden, _ = run_graph(graph, codes_of("svvt"))
    embeds = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(hidden, decoder().norm(embeds))
    assert calls_of(graph, "_proj") == []


def test_a_fused_projection_is_sliced_after_it() -> None:
    config = Phi3Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=LAYERS,
                        intermediate_size=96, vocab_size=128, pad_token_id=0)  # fmt: skip
    phi = Phi3Model._from_config(config, attn_implementation="sdpa").eval()
    graph = build(kv_only_from(2), SLICED, model=phi)
    (qkv,) = calls_of(graph, "qkv_proj", layer=2)
    (out,) = calls_of(graph, "o_proj", layer=2)
    assert (str(qkv.meta["tokens"]), str(out.meta["tokens"])) == ("all", "system_text")
    assert [block.fused for block in graph.blocks if block.name in ("L00_mha", "L02_mha")] == [False, True]
    assert not any(block.fused for block in build(kv_only_from(2), SLICED).blocks)


def test_queries_and_keys_of_different_groups() -> None:
    """Text alone asks, visual tokens alone answer: a union that is neither side."""
    pruned = [("system", 1, "mha_query"), ("visual", 1, "mha_query"), ("system", 1, "mha_key_value"),
              ("text", 1, "mha_key_value")]  # fmt: skip
    graph = build(Policy.from_operations(LAYERS, pruned), SLICED)
    assert str(calls_of(graph, "input_layernorm", layer=1)[0].meta["tokens"]) == "visual_text"
    assert str(calls_of(graph, "q_proj", layer=1)[0].meta["tokens"]) == "text"
    assert str(calls_of(graph, "k_proj", layer=1)[0].meta["tokens"]) == "visual"


def test_a_value_without_a_token_dimension_is_refused() -> None:
    graph = build(Policy.full(LAYERS), [ANNOTATE])
    node = graph.blocks.__next__().branch
    node.meta["val"] = torch.empty(3, 3)  # type: ignore[union-attr]
    with pytest.raises(PassError, match="no batch and token dimension"):
        token_dims(node)  # type: ignore[arg-type]


def test_it_needs_annotations_and_runs_once() -> None:
    with pytest.raises(PassError, match="needs annotate"):
        build(Policy.full(LAYERS), [SLICE_OPERATIONS])
    with pytest.raises(PassError, match="already run"):
        run_passes(build(kv_only_from(2), SLICED), [SLICE_OPERATIONS])


def _with_bypassed_mlp(codes: torch.Tensor, depth: int) -> torch.Tensor:
    """The untouched decoder, with the MLP output of visual tokens zeroed from a depth on."""
    model = decoder()
    embeds = torch.randn(*codes.shape, 64, generator=torch.Generator().manual_seed(0))
    visual = (codes == 1)[..., None]

    def bypass(module: nn.Module, args: object, out: torch.Tensor) -> torch.Tensor:
        return torch.where(visual, 0, out)

    hooks = [layer.mlp.register_forward_hook(bypass) for layer in model.layers[depth:]]
    try:
        with torch.no_grad():
            return model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
