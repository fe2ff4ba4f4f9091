"""The compiler on trained weights, which show errors that random weights hide."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from digits_vlm import data, models
from dop_compile import Policy, dop_compile
from tests.drawing import examples
from tests.families import FAMILIES
from tests.strategies import policies
from tests.support import (
    Batch,
    assert_forward_matches,
    assert_generates_reference,
    assert_rows_match,
    compile_eagerly,
    fixed_policies,
)

CHECKPOINTS = Path(models.__file__).parent / "checkpoints"
SHIPPED = models.NAMES
LAYERS = 8


class DigitsBatch(Batch):
    """A batch of a trained model, whose placeholder ids are its own."""

    @property
    def visual(self) -> Tensor:
        return self.inputs["input_ids"] == self.model.config.image_token_id


@functools.cache
def trained(name: str) -> tuple[Any, models.Reader]:
    model, reader = models.load(CHECKPOINTS / name)
    model.generation_config.eos_token_id = None  # the oracle goes on behind an answer's end
    return model, reader


def digits_batch(name: str, start: int = 0, count: int = 3, *, generates: bool = True) -> Batch:
    model, reader = trained(name)
    examples = list(data.examples("validation", start + count, seed=3))[start:]
    inputs = reader([e.image for e in examples], [e.prompt for e in examples])
    if name == "llava" and not generates:
        # As generate does: padding would shift all positions, and trained weights feel how rotations are rounded there
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(0)
    return DigitsBatch(replace(FAMILIES[name], num_layers=LAYERS), model, inputs)


@torch.no_grad()
@pytest.mark.parametrize("name", SHIPPED)
def test_full_policy_is_the_trained_model_bit_by_bit(name: str) -> None:
    batch = digits_batch(name, count=5)
    compiled = compile_eagerly(batch.model, {"full": Policy.full(LAYERS), "all": Policy.full(LAYERS)})
    expected = batch.model(**batch.inputs).logits
    for tier in ("full", "all"):
        assert torch.equal(compiled(**batch.inputs, tier=tier).logits[batch.mask], expected[batch.mask])
    answers = batch.model.generate(**batch.inputs)
    assert torch.equal(compiled.generate(**batch.inputs), answers)


@pytest.mark.parametrize("kind", ["joint_depth", "query_and_key_value_apart", "uniform", "given_scattered"])
@pytest.mark.parametrize("name", SHIPPED)
def test_pruned_model_is_the_reference(name: str, kind: str) -> None:
    batch = digits_batch(name)
    policy, kept = fixed_policies(batch)[kind]
    compiled = compile_eagerly(batch.model, policy)
    if kind == "uniform":  # ids of placeholders differ from the families'
        size = batch.counts[0]
        kept = [[(2 * number + 1) * size // 12 for number in range(6)] for _ in batch.counts]
    assert_forward_matches(compiled, batch, policy, kept)
    assert_generates_reference(compiled, batch, policy, kept)


@examples(6)
@given(st.sampled_from(SHIPPED), policies(LAYERS, reduction=False), st.integers(0, 20), st.data())
def test_random_policies_are_the_reference(name: str, policy: Policy, start: int, draw: st.DataObject) -> None:
    batch = digits_batch(name, start, 2, generates=False)
    count = draw.draw(st.integers(1, batch.counts[0]))
    kept = batch.random_kept(count, seed=start)
    policy = policy.replace(reducer="given", visual_tokens=count, positions="original")
    assert_forward_matches(compile_eagerly(batch.model, policy), batch, policy, kept)


@pytest.mark.conformance
@torch.no_grad()
def test_inductor_gives_the_trained_answers() -> None:
    batch = digits_batch("llava", count=2)
    policy = Policy.depthwise(LAYERS, mha_query_depth=3, mha_key_value_depth=7, mlp_depth=2)
    compiled = dop_compile(batch.model, policy)
    expected = compile_eagerly(batch.model, policy)(**batch.inputs).logits
    assert_rows_match(compiled(**batch.inputs).logits, expected, batch.mask, 1e-4)
