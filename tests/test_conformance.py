"""Every model family: 100 % is the untouched model bit by bit, and every policy is the masked reference.

The batches have images at different places and of different counts, a video where the class takes one, and a row
without images.
"""

from __future__ import annotations

import pytest
import torch

from dop_compile import Policy
from tests.families import FAMILIES
from tests.make_table import supported_models_table, table_in_readme
from tests.reference import split_rows
from tests.support import (
    Batch,
    assert_close,
    assert_forward_matches,
    assert_generates_reference,
    assert_rows_match,
    compile_eagerly,
    fixed_policies,
    make_batch,
    original_decoder_forbidden,
    shared_model,
)

POLICIES = ("joint_depth", "query_and_key_value_apart", "uniform", "given_scattered")
GENERATED = ("query_and_key_value_apart", "given_scattered")


def full_policies(batch: Batch) -> dict[str, Policy]:
    """Three ways to say 100 %; none of them may fall back to the original forward."""
    layers = batch.family.num_layers
    return {
        "full": Policy.full(layers),
        "no operation": Policy.from_operations(layers, []),
        "every visual token": Policy.depthwise(layers, visual_tokens=max(batch.counts)),
    }


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_full_policy_is_the_untouched_model_bit_by_bit(name: str, attn: str) -> None:
    left = make_batch(name, model=shared_model(name, attn))
    right = make_batch(name, model=left.model, padding="right", seed=1)
    compiled = compile_eagerly(left.model, full_policies(left))
    for batch in (left, right):
        expected = batch.model(**batch.inputs).logits
        for tier in compiled.dop.tiers:
            arguments = batch.inputs | batch.call_arguments() | {"tier": tier}
            compiled(**arguments)
            with original_decoder_forbidden(batch.model):
                logits = compiled(**arguments).logits
            assert torch.equal(logits, expected), tier
            assert_rows_match(compiled(**arguments, logits_to_keep=1).logits, expected, batch.mask)
    assert compiled.dop.programs
    generated = compiled.generate(**left.inputs, **left.call_arguments(), max_new_tokens=6, do_sample=False)
    assert torch.equal(generated, left.model.generate(**left.inputs, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("policy_name", POLICIES)
@pytest.mark.parametrize("name", FAMILIES)
def test_pruned_model_is_the_reference(name: str, policy_name: str) -> None:
    # Left padding is how generate wants it; a plain forward may also be padded on the right
    generates = policy_name in GENERATED
    batch = make_batch(name, padding="left" if generates else "right")
    policy, kept = fixed_policies(batch)[policy_name]
    compiled = compile_eagerly(batch.model, policy)
    assert_forward_matches(compiled, batch, policy, kept)
    if generates:
        assert_generates_reference(compiled, batch, policy, kept)
    assert compiled.dop.programs


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_row_of_a_left_padded_batch_is_as_if_alone(name: str) -> None:
    batch = make_batch(name)
    policy, kept = fixed_policies(batch)["given_scattered"]
    assert kept is not None
    compiled = compile_eagerly(batch.model, policy, debug=False)
    together = compiled(**batch.inputs, **batch.call_arguments(kept)).logits
    for index, row in enumerate(split_rows(batch.model, batch.inputs, kept, batch.groups)):
        own = {} if row.groups is None else {"token_groups": row.groups[None]}
        alone = compiled(**row.inputs, **own, visual_indices=[kept[index]]).logits[0]
        assert_close(together[index, batch.mask[index]], alone)


def test_readme_lists_the_families_that_are_tested() -> None:
    assert table_in_readme() == supported_models_table(), "run `python -m tests.make_table`"
