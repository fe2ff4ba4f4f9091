"""Packed rows, several samples in one row: the reference is each sample alone, by the untouched model with masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dop_compile import Policy
from dop_compile.errors import UnsupportedUsageError
from dop_compile.policy.ranking import Ranking, Stage
from tests.conformance.text_only import TEXT_ONLY
from tests.families import FAMILIES
from tests.reference import text_decoder
from tests.support import (
    Batch,
    Rows,
    assert_close,
    compile_eagerly,
    fixed_policies,
    make_batch,
    operations,
    shared_model,
    uniform_kept,
)
from tests.support import reference as padded_reference

SAMPLES: Rows = [
    [("text", 4), ("image",), ("text", 3)],
    [("text", 2), ("image", 1), ("text", 5), ("image",), ("text", 2)],
    [("text", 6)],
]
NAMES = ("llava", "gemma3", "qwen2_5_vl", "qwen3_vl", "llama")


def packed(batch: Batch) -> dict[str, Any]:
    """The samples of a batch in one row, without padding, and the positions that tell them apart."""
    mask, inputs = batch.mask, dict(batch.inputs)
    del inputs["attention_mask"]
    joined = {n: v[mask][None] if v.shape == mask.shape else v for n, v in inputs.items()}
    text = torch.cat([torch.arange(int(length)) for length in mask.sum(1)])[None]
    joined["position_ids"] = text
    if batch.family.has_mrope:
        known = {n: v for n, v in batch.inputs.items() if not v.is_floating_point()}
        axes = batch.model.base_model.get_rope_index(**known)[0][:, mask][:, None]
        joined["position_ids"] = torch.cat([text[None], axes])
    if batch.groups is not None:
        joined["token_groups"] = batch.groups[mask][None]
    return joined | {"use_cache": False}


def samples(name: str) -> Batch:
    family = FAMILIES[name] if name in FAMILIES else TEXT_ONLY[name]
    return make_batch(family, [[("text", 14)], [("text", 9)], [("text", 5)]] if family.is_text_only else SAMPLES)


def in_one_row(rows: Tensor, batch: Batch) -> Tensor:
    return rows[batch.mask][None]


@torch.no_grad()
@pytest.mark.parametrize("name", [*NAMES, "gemma4_unified_shared_text"])
def test_samples_of_a_packed_row_are_those_samples_alone(name: str) -> None:
    batch = samples(name)
    inputs = packed(batch)
    policies = fixed_policies(batch)
    for policy, kept in policies.values() if name == "llava" else [policies["given_scattered"]]:
        given: dict[str, Any] = {"visual_indices": kept} if policy.reducer == "given" else {}
        expected = in_one_row(padded_reference(batch, policy, kept), batch)
        compiled = compile_eagerly(batch.model, policy)
        assert_close(compiled(**inputs, **given).logits, expected)
        assert_close(compiled(**inputs, **given, logits_to_keep=8).logits, expected[:, -8:])


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_policy_that_prunes_nothing_leaves_a_packed_row_to_the_model(name: str) -> None:
    batch = samples(name)
    inputs = packed(batch)
    own = {n: v for n, v in inputs.items() if n != "token_groups"}
    compiled = compile_eagerly(batch.model, Policy.full(batch.family.num_layers))
    expected = batch.model(**own).logits
    assert torch.equal(compiled(**inputs).logits, expected)
    assert_close(compiled(**inputs, logits_to_keep=8).logits, expected[:, -8:])
    if name != "gemma3":  # whose masks, built before there is a cache, keep samples apart with one too
        assert_close(expected, in_one_row(padded_reference(batch, Policy.full(batch.family.num_layers)), batch))
    assert torch.equal(compiled(**inputs | {"use_cache": True}).logits, batch.model(**own | {"use_cache": True}).logits)


@torch.no_grad()
def test_indices_are_for_samples_or_for_rows() -> None:
    batch = samples("llava")
    policy = Policy.full(batch.family.num_layers).replace(reducer="given")
    compiled, kept = compile_eagerly(batch.model, policy), batch.random_kept(4)
    first = batch.counts[0]
    of_row = [*kept[1]], [*kept[0]]
    row = [*(first + index for index in of_row[0]), *of_row[1]]
    expected = in_one_row(padded_reference(batch, policy, kept), batch)
    inputs = packed(batch)
    for given in (kept, [row]):
        assert_close(compiled(**inputs, visual_indices=given).logits, expected)
    with pytest.raises(ValueError, match="for 2 samples, but the batch has 1 rows with 3 samples"):
        compiled(**inputs, visual_indices=kept[:2])


@torch.no_grad()
def test_budgets_and_rankings_are_per_sample() -> None:
    batch = samples("llava")
    layers = batch.family.num_layers
    reduced = Policy.full(layers).replace(visual_tokens=4, reducer="uniform", positions="compact")
    expected = in_one_row(padded_reference(batch, reduced, uniform_kept(batch, 4)), batch)
    assert_close(compile_eagerly(batch.model, reduced)(**packed(batch)).logits, expected)
    ranked = Policy(layers, ranking=Ranking("last_token", (Stage(1, fraction=0.5),)))
    compiled = compile_eagerly(batch.model, ranked)
    alone = in_one_row(compiled(**batch.inputs, use_cache=False).logits, batch)
    assert_close(compiled(**packed(batch)).logits, alone)


def test_training_on_packed_rows_has_the_loss_and_gradients_of_the_samples() -> None:
    batch = samples("llava")
    model = FAMILIES["llava"].build()
    policy = Policy.depthwise(batch.family.num_layers, mha_query_depth=1, mlp_depth=2, visual_tokens=5)
    compiled = compile_eagerly(model, policy)
    inputs = packed(batch)
    labels = inputs["input_ids"].clone()
    labels[inputs["position_ids"] == 0] = -100  # of the sample before
    padded_labels = torch.full_like(batch.inputs["input_ids"], -100)
    padded_labels[batch.mask] = labels[0]
    found = []
    for call, wanted in ((inputs, labels), (batch.inputs | {"use_cache": False}, padded_labels)):
        model.zero_grad()
        loss = compiled(**call, labels=wanted).loss
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in text_decoder(model).parameters() if p.grad is not None]))
    assert_close(found[0][0], found[1][0])
    assert len(found[0][1]) == len(found[1][1]) > 0
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert_close(one, other, 1e-4)


@torch.no_grad()
def test_refused_where_the_original_lets_samples_see_each_other() -> None:
    batch = samples("qwen2_5_vl")
    policy = Policy.depthwise(batch.family.num_layers, mha_depth=2, visual_tokens=4)
    compiled, inputs = compile_eagerly(batch.model, policy), packed(batch)
    for change in ({"use_cache": True}, {"position_ids": inputs["position_ids"][0]}):
        with pytest.raises(UnsupportedUsageError, match="rows of a padded batch"):
            compiled(**inputs | change)
    gemma = samples("gemma3")
    compiled = compile_eagerly(gemma.model, Policy.depthwise(gemma.family.num_layers, mha_depth=2))
    with pytest.raises(UnsupportedUsageError, match="cannot be cached"):
        compiled(**packed(gemma) | {"use_cache": True})


@torch.no_grad()
def test_one_sample_in_a_row_is_not_taken_apart() -> None:
    """Positions that begin elsewhere, M-RoPE's and those of padded rows are none of several samples."""
    model = shared_model("qwen2_5_vl")
    batch = make_batch("qwen2_5_vl", [SAMPLES[1]], model=model)
    policy = Policy.from_operations(
        batch.family.num_layers, operations(batch.family.num_layers, ("visual",), ("mlp",)), visual_tokens=5
    )
    compiled = compile_eagerly(model, policy)
    expected = compiled(**batch.inputs).logits
    without_mask = {n: v for n, v in batch.inputs.items() if n != "attention_mask"}
    for use_cache in (True, False):
        assert_close(compiled(**without_mask, use_cache=use_cache).logits, expected)
    known = {n: v for n, v in batch.inputs.items() if not v.is_floating_point()}
    axes = model.base_model.get_rope_index(**known)[0]
    for positions in (axes, torch.cat([torch.arange(5, 5 + axes.shape[-1])[None, None], axes])):
        assert_close(compiled(**without_mask, position_ids=positions, use_cache=False).logits, expected)
