"""Exported graphs in ONNX Runtime against the original model, from pixels and ids to tokens."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st

from dop_compile import Policy, UnsupportedModelError, export_onnx
from dop_compile.onnx.check.graphs import OPERATORS, check_graph, operators
from dop_compile.onnx.contract.manifest import MANIFEST, WEIGHTS, Manifest
from dop_compile.onnx.export.convert import Signature, write_graph
from dop_compile.onnx.export.describe import slugs
from dop_compile.onnx.export.graphs import Reduce
from dop_compile.onnx.export.weights import WeightStore
from dop_compile.onnx.run.plain import PlainPipeline
from dop_compile.onnx.run.sessions import GraphSession
from dop_compile.reducers import VisualContext, create, select_tokens
from tests.conformance.hybrid import HYBRID
from tests.conformance.text_only import TEXT_ONLY
from tests.drawing import examples
from tests.families import FAMILIES
from tests.onnx_export.exported import (
    PROVIDER,
    PRUNED,
    TIERS,
    batch_of,
    example_rows,
    exported,
    pipeline,
    run,
    static_export,
    static_model,
)
from tests.onnx_export.harness import EXPORTED, LAYERS, small_family, small_model
from tests.reference import reference_generate
from tests.support import Batch, assert_close, reference, uniform_kept

TOKENS = 3


def kept_of(batch: Batch, policy: Policy) -> list[list[int]] | None:
    return None if policy.visual_tokens is None else uniform_kept(batch, policy.visual_tokens)


def rows_of(name: str) -> list[list[tuple[object, ...]]]:
    """Rows of unlike lengths, one without an image, of the layouts that were exported."""
    return [[("text", 5)], *example_rows(FAMILIES[name]), [("text", 1), ("image", 0), ("text", 7)]]


@pytest.mark.parametrize("name", EXPORTED)
def test_full_tier_is_the_original(name: str) -> None:
    batch = batch_of(name, rows_of(name))
    with torch.no_grad():
        original = batch.model(**batch.inputs).logits[:, -1]
        generated = batch.model.generate(**batch.inputs, max_new_tokens=TOKENS, do_sample=False)
    logits, ids = run(pipeline(name, True), "100%", batch.inputs, TOKENS)
    assert_close(logits, original, 2e-5)
    assert ids == generated[:, batch.inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("optimized", [True, False])
@pytest.mark.parametrize("name", EXPORTED)
def test_pruned_tier_is_the_masked_original(name: str, optimized: bool) -> None:
    batch = batch_of(name, rows_of(name), seed=1)
    kept = kept_of(batch, PRUNED)
    logits, ids = run(pipeline(name, optimized), "pruned", batch.inputs, TOKENS)
    assert_close(logits, reference(batch, PRUNED, kept)[:, -1], 2e-5)
    assert ids == reference_generate(batch.model, batch.inputs, PRUNED, TOKENS, kept)


@pytest.mark.parametrize("opset", [23, pytest.param(18, marks=pytest.mark.conformance)])
@given(data=st.data())
@examples(10)
def test_any_lengths_and_padding(opset: int, data: st.DataObject) -> None:
    length = st.integers(1, 9)
    rows = [
        [("text", data.draw(length)), *([("image",)] if data.draw(st.booleans()) else []), ("text", data.draw(length))]
        for _ in range(data.draw(st.integers(1, 4)))
    ]
    batch = batch_of("llava", rows, seed=data.draw(st.integers(0, 9)))
    found = pipeline("llava", data.draw(st.booleans()), opset)
    tier = data.draw(st.sampled_from(sorted(found.manifest.tiers)))
    kept = kept_of(batch, TIERS[tier])
    logits, ids = run(found, tier, batch.inputs, TOKENS)
    assert_close(logits, reference(batch, TIERS[tier], kept)[:, -1], 2e-5)
    assert ids == reference_generate(batch.model, batch.inputs, TIERS[tier], TOKENS, kept)


@pytest.mark.parametrize("name", EXPORTED)
def test_graphs_are_valid_and_of_standard_operators(name: str) -> None:
    check_all(name, 23)


@pytest.mark.conformance
def test_graphs_of_opset_18_are_valid_and_of_standard_operators() -> None:
    check_all("llava", 18)


def check_all(name: str, opset: int) -> None:
    folder = exported(name, opset)
    manifest = Manifest.load(folder, hashes=True)
    for graph in manifest.graphs.values():
        path = folder / graph.data.file
        model = onnx.load(path, load_external_data=False)
        assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]
        assert not model.functions
        assert operators(path) <= OPERATORS[opset]
        check_graph(path, opset)
        assert [i.name for i in model.graph.input] == [i.name for i in graph.inputs]
        assert [o.name for o in model.graph.output] == [o.name for o in graph.outputs]


@pytest.mark.conformance
def test_opset_23_uses_its_operators_and_18_does_not() -> None:
    new = {"Attention", "RMSNormalization", "RotaryEmbedding"}
    graph = Manifest.load(exported("llava")).tiers["pruned"].prefill
    assert new <= operators(exported("llava") / f"{graph}.onnx")
    assert not new & operators(exported("llava", 18) / f"{graph}.onnx")


def test_operators_outside_the_list_are_refused(tmp_path: Path) -> None:
    node = onnx.helper.make_node("FusedMatMul", ["x", "x"], ["y"], domain="com.microsoft")
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [2, 2]) for n in "xy")
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y]), opset_imports=opsets)
    onnx.save(model, tmp_path / "g.onnx")
    with pytest.raises(ValueError, match=r"com\.microsoft::FusedMatMul"):
        check_graph(tmp_path / "g.onnx", 23)


def test_layers_store_what_the_policy_keeps() -> None:
    manifest = Manifest.load(exported("llava"))
    text, visual = ("text",), ("visual", "text")
    assert [(c.layers, c.tiers) for c in manifest.past_classes] == [
        ((0,), {"100%": visual, "pruned": visual}),
        ((1,), {"100%": visual, "pruned": text}),
    ]
    outputs = {o.name: o.shape for o in manifest.graphs[manifest.tiers["pruned"].prefill].outputs}
    assert outputs["present.0.key"][2] == "text + 5"
    assert outputs["present.1.key"][2] == "text"
    past = {i.name: i.shape for i in manifest.graphs["decode"].inputs}
    assert (past["past_key_values.0.key"][2], past["past_key_values.1.value"][2]) == ("past_0", "past_1")


@pytest.mark.parametrize("optimized", [True, False])
def test_reducer_graph_keeps_what_the_reducer_keeps(optimized: bool) -> None:
    info = Manifest.load(exported("llava")).tiers["pruned"].reducer
    assert info is not None
    assert (info.name, info.graph, info.tokens, info.reason) == ("uniform", "reduce-pruned", 9, "")
    features = torch.randn(9, 64)
    context = VisualContext(features, torch.zeros(3, 64), torch.zeros(9, dtype=torch.long), 0)
    expected = select_tokens(create("uniform"), context, 5).indices.sort().values
    found = pipeline("llava", optimized).session("reduce-pruned").run({"features": features})
    assert torch.equal(found["indices"], expected)
    assert torch.equal(found["kept"], features[expected])


@pytest.mark.parametrize("opset", [18, 23])
def test_divprune_as_a_graph(tmp_path: Path, opset: int) -> None:
    """Its greedy choice, equal features included."""
    policy = Policy.depthwise(2, visual_tokens=7, reducer="divprune")
    signature = Signature((("features", torch.float32, (20, 8)),), Reduce.output_names)
    with WeightStore(tmp_path / WEIGHTS) as store:
        write_graph(Reduce(policy), signature, {}, tmp_path / "reduce.onnx", store, opset)
        store.finish()
    session = GraphSession(tmp_path / "reduce.onnx", PROVIDER, True)
    for features in (torch.randn(20, 8), torch.randn(4, 8).repeat(5, 1)):
        context = VisualContext(features, torch.zeros(1, 8), torch.zeros(20, dtype=torch.long), 0)
        expected = select_tokens(create("divprune"), context, 7).indices.sort().values
        assert torch.equal(session.run({"features": features})["indices"], expected)


def test_file_names_of_tiers_are_unlike() -> None:
    found = slugs(["28%", "28", "28-1", "A b", "a/B", "%", ""])
    assert len({name.lower() for name in found.values()}) == 7
    assert slugs(["100%", "28% split"]) == {"100%": "100", "28% split": "28-split"}


def test_the_profile_of_whole_prompts_holds_their_visual_tokens() -> None:
    manifest = Manifest.load(exported("llava"))
    (embed,) = manifest.graphs["embed"].inputs
    text = next(i for i in manifest.graphs["prefill-pruned"].inputs if i.name == "slots.text")
    assert (embed.min[1], embed.opt[1], embed.max[1]) == (1, text.opt[1] + 9, text.max[1] + 9)


def test_reducer_is_the_runtimes_where_a_graph_cannot_tell() -> None:
    """Images and videos."""
    info = Manifest.load(exported("qwen2_5_vl")).tiers["pruned"].reducer
    assert info is not None
    assert info.graph is None
    assert info.reason
    assert Manifest.load(exported("llava")).tiers["100%"].reducer is None


def test_tiers_share_the_weights() -> None:
    """Three tiers take at most 1.02 x the disk of one, and the file is not much larger than the model."""
    folder = static_export()
    manifest = Manifest.load(folder)
    assert len(manifest.tiers) == 3
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    more = [g for name, tier in manifest.tiers.items() if name != "full" for g in (tier.prefill, tier.reducer.graph)]
    own = sum((folder / manifest.graphs[graph].data.file).stat().st_size for graph in more)
    # A manifest of one tier is smaller, too, but not by as much as all of it
    assert size <= 1.02 * (size - own - (folder / MANIFEST).stat().st_size)
    parameters = {p.data_ptr(): p.numel() * p.element_size() for p in static_model().parameters()}
    assert (folder / WEIGHTS).stat().st_size <= 1.02 * sum(parameters.values())


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=4096, tie_word_embeddings=True, **sizes)).eval()
    table = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is table
    model.generation_config.eos_token_id = None
    manifest = export_onnx(model, Policy.full(1), tmp_path / "out")
    assert manifest.weights.bytes < 1.2 * table.numel() * table.element_size()
    ids = torch.tensor([[7, 3, 4000, 12, 9]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        generated = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        original = model(**inputs).logits[:, -1]
    for optimized in (True, False):
        found = PlainPipeline(tmp_path / "out", manifest, model, PROVIDER, optimized)
        logits, tokens = run(found, "default", inputs, TOKENS)
        assert_close(logits, original, 2e-5)
        assert tokens == generated[:, 5:].tolist()


def test_static_export_has_no_dynamic_size() -> None:
    manifest = Manifest.load(static_export())
    for graph in manifest.graphs.values():
        for spec in graph.inputs:
            assert spec.shape == spec.min == spec.opt == spec.max or spec.name == "input_ids"
    past = next(i for i in manifest.graphs["decode"].inputs if i.name == "past_slots.0")
    assert past.shape == (1, 9 + 12 + 4)


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    model = small_model("llava", 1)
    example = small_family("llava", 1).make_inputs(model, [[("text", 3), ("image",), ("text", 3)]])
    full = Policy.full(1)
    with pytest.raises(ValueError, match="opset: expected one of 18, 23"):
        export_onnx(model, full, tmp_path / "a", examples=[example], opset=20)
    with pytest.raises(ValueError, match="examples"):
        export_onnx(model, full, tmp_path / "a")
    with pytest.raises(ValueError, match="2 layers"):
        export_onnx(model, Policy.full(2), tmp_path / "a", examples=[example])
    two = small_family("llava", 1).make_inputs(model, [[("text", 3)], [("text", 3)]])
    with pytest.raises(ValueError, match="one row, got 2"):
        export_onnx(model, full, tmp_path / "a", examples=[two])
    (tmp_path / "b").mkdir()
    with pytest.raises(FileExistsError, match="--force"):
        export_onnx(model, full, tmp_path / "b", examples=[example])
    assert sorted(os.listdir(tmp_path)) == ["b"]


def test_attention_without_an_operator_is_refused(tmp_path: Path) -> None:
    model = small_family("llava").build(attn="flex_attention")
    with pytest.raises(UnsupportedModelError, match=r"flex_attention.*attn_implementation='sdpa' or 'eager'"):
        export_onnx(model, TIERS, tmp_path / "out", examples=[])
    assert not (tmp_path / "out").exists()


def test_a_decoder_that_keeps_states_is_refused(tmp_path: Path) -> None:
    model = HYBRID["lfm2_vl"].build()
    with pytest.raises(UnsupportedModelError, match=r"layers with Lfm2ShortConv keep a state"):
        export_onnx(model, Policy.full(4), tmp_path / "onnx", examples=[{"input_ids": torch.arange(3)[None]}])
    assert not (tmp_path / "onnx").exists()


def test_layers_that_read_earlier_keys_are_refused(tmp_path: Path) -> None:
    model = TEXT_ONLY["gemma4_unified_shared_text"].build()
    with pytest.raises(UnsupportedModelError, match=r"layers \[3, 4, 5\] read the keys and values of earlier layers"):
        export_onnx(model, Policy.full(6), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_training_mode_is_refused(tmp_path: Path) -> None:
    model = small_family("llava", 1).build().train()
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        export_onnx(model, Policy.full(1), tmp_path / "a", examples=[{}])


def test_manifest_is_in_the_directory() -> None:
    folder = exported("llava")
    manifest = Manifest.load(folder, hashes=True)
    assert Manifest.from_json((folder / MANIFEST).read_text()) == manifest
    assert manifest.tiers["pruned"].policy == PRUNED
    assert manifest.model.num_layers == LAYERS
    assert {data.file for data in manifest.data_files} == {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.name != MANIFEST
    }
