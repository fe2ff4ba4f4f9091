"""The modules that are exported, run in PyTorch, against the masked original: any policy, lengths and padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dop_compile import Policy, UnsupportedModelError
from dop_compile.onnx.export.capture import capture_prompt
from tests.drawing import examples
from tests.families import FAMILIES
from tests.onnx_export.harness import FIVE, greedy_in_pytorch, small_batch, small_family
from tests.reference import reference_generate
from tests.strategies import policies
from tests.support import ONE_IMAGE, Batch, assert_close, make_batch, mixed_rows, reference, shared_model, uniform_kept

LAYERS = 3
TOKENS = 3


def assert_matches(batch: Batch, policy: Policy, kept: list[list[int]] | None = None) -> None:
    """First-token logits and greedy ids of every row are the oracle's."""
    given = kept if policy.reducer == "given" else None
    logits, ids = greedy_in_pytorch(batch, policy, TOKENS, given)
    assert_close(logits, reference(batch, policy, kept)[:, -1])
    assert ids == reference_generate(batch.model, batch.inputs, policy, TOKENS, kept)


@pytest.mark.parametrize("name", FIVE)
def test_full_policy_is_the_original(name: str) -> None:
    batch = small_batch(name, mixed_rows(FAMILIES[name]), LAYERS)
    logits, _ = greedy_in_pytorch(batch, Policy.full(LAYERS), 1)
    with torch.no_grad():
        original = batch.model(**batch.inputs).logits[:, -1]
    assert_close(logits, original)


@pytest.mark.parametrize("name", FIVE)
def test_frozen_and_reduced_tokens(name: str) -> None:
    batch = small_batch(name, mixed_rows(FAMILIES[name]), LAYERS)
    policy = Policy.depthwise(LAYERS, mha_query_depth=1, mha_key_value_depth=2, mlp_depth=1, visual_tokens=6)
    assert_matches(batch, policy, uniform_kept(batch, 6))


@pytest.mark.parametrize("name", ["mistral3", "cohere2_vision", "smolvlm"])
def test_other_families(name: str) -> None:
    """Sliding windows count slots, also in a layer that holds a part of them."""
    layers = FAMILIES[name].num_layers if FAMILIES[name].has_sliding_layers else LAYERS
    batch = small_batch(name, mixed_rows(FAMILIES[name]), layers)
    policy = Policy.depthwise(layers, mha_query_depth=1, mha_key_value_depth=2, mlp_depth=1, visual_tokens=6)
    assert_matches(batch, policy, uniform_kept(batch, 6))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "fast_vlm"])
def test_eager_attention_adds_its_masks(name: str) -> None:
    family = small_family(name, LAYERS)
    batch = make_batch(family, mixed_rows(family), model=family.build(attn="eager"))
    policy = Policy.depthwise(LAYERS, mha_query_depth=1, mha_key_value_depth=2, mlp_depth=1, visual_tokens=6)
    assert_matches(batch, policy, uniform_kept(batch, 6))


def test_a_layer_without_keys() -> None:
    """Its queries get an attention output of zero before the output projection."""
    batch = small_batch("llava", mixed_rows(FAMILIES["llava"]), LAYERS)
    policy = Policy.from_operations(LAYERS, [(group, 1, "mha_key_value") for group in ("system", "visual", "text")])
    assert_matches(batch, policy)


@given(data=st.data())
@examples(12)
def test_any_policy(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(("llava", "qwen2_5_vl")))
    length = st.integers(1, 5)
    count = data.draw(st.integers(1, 3))
    rows = [
        [
            ("text", data.draw(length)),
            *([("image",)] if data.draw(st.booleans()) else []),
            ("text", data.draw(length) + 1),
        ]
        for _ in range(count)
    ]
    batch = small_batch(name, rows, LAYERS)
    policy = data.draw(policies(LAYERS, max_visual_tokens=9))
    if batch.family.has_mrope:
        policy = policy.replace(positions="original")
    kept = None if policy.visual_tokens is None else uniform_kept(batch, policy.visual_tokens)
    assert_matches(batch, policy, kept)


def test_salient_tokens_are_a_section_of_their_own() -> None:
    batch = small_batch("llava", mixed_rows(FAMILIES["llava"]), LAYERS)
    pruned = [("visual_rest", layer, "mha") for layer in range(1, LAYERS)] + [("visual_salient", 2, "mlp")]
    policy = Policy.from_operations(LAYERS, pruned, visual_tokens=6, salient_fraction=0.5, reducer="given")
    kept = batch.random_kept(6)
    logits, ids = greedy_in_pytorch(batch, policy, TOKENS, kept)
    salient = [sorted(row[: (len(row) + 1) // 2]) for row in kept]
    assert_close(logits, reference(batch, policy, kept, salient)[:, -1])
    assert ids == reference_generate(batch.model, batch.inputs, policy, TOKENS, kept, salient=salient)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
def test_decoders_that_need_more_than_embeddings_are_refused(name: str) -> None:
    batch = make_batch(name, ONE_IMAGE, model=shared_model(name))
    with pytest.raises(UnsupportedModelError, match="export to ONNX"):
        capture_prompt(batch.model, batch.inputs)
