"""What a forward call returns: requested rows, loss, precisions; and which numbers the cache reports."""

from __future__ import annotations

import pytest
import torch

from dop_compile import Policy
from tests.families import FAMILIES
from tests.support import (
    Batch,
    assert_close,
    assert_rows_match,
    compile_eagerly,
    fixed_policies,
    make_batch,
    operations,
    random_operations,
    reference,
)

NAMES = ("llava", "qwen2_5_vl", "gemma3")
# The last image ends one token before the end, so that the last rows are those of removed visual tokens
ROWS = [[("text", 3), ("image",), ("text", 2), ("image", 1), ("text", 1)], [("image",), ("text", 1)]]


def reduced(name: str) -> tuple[Batch, Policy, list[list[int]]]:
    batch = make_batch(name, ROWS)
    policy, kept = fixed_policies(batch)["given_scattered"]
    assert kept is not None
    return batch, policy, kept


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_last_rows_reach_over_removed_tokens(name: str) -> None:
    batch, policy, kept = reduced(name)
    compiled = compile_eagerly(batch.model, policy)
    expected = reference(batch, policy, kept)
    for rows in (1, 2, 5, 8, 100):
        logits = compiled(**batch.inputs, visual_indices=kept, logits_to_keep=rows).logits
        assert_rows_match(logits, expected, batch.mask)
        assert logits.shape[1] == min(rows, expected.shape[1])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_rows_named_by_a_tensor(name: str) -> None:
    batch, policy, kept = reduced(name)
    compiled = compile_eagerly(batch.model, policy)
    expected = reference(batch, policy, kept)
    chosen = torch.tensor([expected.shape[1] - 1, expected.shape[1] - 4, expected.shape[1] - 8])
    logits = compiled(**batch.inputs, visual_indices=kept, logits_to_keep=chosen).logits
    assert_close(logits, expected[:, chosen])


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_loss(name: str, padding: str) -> None:
    batch = make_batch(name, ROWS, padding=padding)
    policy, kept = fixed_policies(batch)["given_scattered"]
    compiled = compile_eagerly(batch.model, policy)
    labels = batch.inputs["input_ids"].masked_fill(~batch.mask, -100)
    out = compiled(**batch.inputs, visual_indices=kept, labels=labels)
    expected = reference(batch, policy, kept)
    assert_rows_match(out.logits, expected, batch.mask)
    targets = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    # A row of padding before the first token predicts it: its logits are nobody's, so they are left as they came
    logits = torch.where(batch.mask[..., None], expected, out.logits)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    assert_close(out.loss, loss)


def test_loss_has_the_originals_gradients_at_full_budget() -> None:
    batch = make_batch("llava", ROWS, model=FAMILIES["llava"].build())
    labels = batch.inputs["input_ids"].masked_fill(~batch.mask, -100)
    gradients = []
    for model in (batch.model, compile_eagerly(batch.model, Policy.full(4))):
        batch.model.zero_grad()
        model(**batch.inputs, labels=labels).loss.backward()
        gradients.append([p.grad.clone() for p in batch.model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 20
    for expected, found in zip(*gradients, strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


# Rounding errors grow over the layers: a few units in the last place of numbers as large as the largest logit
TOLERANCE = {torch.bfloat16: 4e-2, torch.float16: 5e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model = FAMILIES[name].build(dtype=dtype)
    batch = make_batch(name, ROWS, model=model)
    full = compile_eagerly(model, Policy.full(batch.family.num_layers))
    assert torch.equal(full(**batch.inputs).logits, model(**batch.inputs).logits)
    policy, kept = fixed_policies(batch)["given_scattered"]
    compiled = compile_eagerly(model, policy)
    logits = compiled(**batch.inputs, visual_indices=kept).logits
    assert logits.dtype == dtype
    assert_rows_match(logits, reference(batch, policy, kept), batch.mask, TOLERANCE[dtype])


@pytest.mark.parametrize("as_tuple", [False, True])
@torch.no_grad()
def test_output_class_and_tuple_are_the_originals(as_tuple: bool) -> None:
    batch = make_batch("llava", ROWS)
    compiled = compile_eagerly(batch.model, Policy.full(4))
    expected = batch.model(**batch.inputs, return_dict=not as_tuple)
    found = compiled(**batch.inputs, return_dict=not as_tuple)
    assert type(found) is type(expected)
    assert torch.equal(found[0], expected[0])
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("name", "start"), [("llava", 0), ("llava", 2), ("llama", 0), ("llama", 2), ("gemma3", 0), ("qwen3_vl", 2)]
)
@torch.no_grad()
def test_when_nothing_is_left_to_compute(name: str, start: int) -> None:
    """Layers where no token of the prompt takes part in anything, or in storing keys and values alone."""
    layers = FAMILIES[name].num_layers
    for rows in (None, [[("text", 6)]]):
        batch = make_batch(name, rows)
        for modules in (("mha_query", "mha_key_value", "mlp"), ("mha_query", "mlp")):
            policy = Policy.from_operations(layers, operations(layers, ("system", "visual", "text"), modules, start))
            compiled = compile_eagerly(batch.model, policy)
            expected = reference(batch, policy)
            for kept_rows in (0, 1):
                out = compiled(**batch.inputs, **batch.call_arguments(), logits_to_keep=kept_rows)
                assert_rows_match(out.logits, expected, batch.mask)
                stored = [(layer.keys.shape[2], layer.values.shape[2]) for layer in out.past_key_values.layers]
                assert all(keys == values for keys, values in stored)


@torch.no_grad()
def test_nan_in_one_row_stays_where_the_reference_has_it() -> None:
    batch = make_batch("llama")
    policy, kept = fixed_policies(batch)["given_scattered"]
    model = FAMILIES["llama"].build()
    batch.inputs["input_ids"][1, -3] = 100
    model.get_input_embeddings().weight[100] = float("nan")
    batch = Batch(batch.family, model, batch.inputs, batch.groups)
    logits = compile_eagerly(model, policy)(**batch.inputs, **batch.call_arguments(kept)).logits
    expected = reference(batch, policy, kept)
    assert expected.isnan().any()
    assert torch.equal(logits.isnan()[batch.mask], expected.isnan()[batch.mask])
    whole = ~expected.isnan() & batch.mask[..., None]
    assert_close(logits[whole], expected[whole])


@torch.no_grad()
def test_random_operations_of_all_groups_with_one_row_without_an_image() -> None:
    batch = make_batch("llava", [*ROWS, [("text", 7)]])
    for seed in range(3):
        policy = Policy.from_operations(4, random_operations(4, seed, share=0.8))
        logits = compile_eagerly(batch.model, policy)(**batch.inputs).logits
        assert_rows_match(logits, reference(batch, policy), batch.mask)
