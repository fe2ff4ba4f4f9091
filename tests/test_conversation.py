"""Conversations of several turns on one cache: the reference is the whole conversation as one sequence.

In it the first turn's tokens keep their groups, so policies here leave text alone: later turns and generated tokens
are text or output, which is the same as long as neither is pruned.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from dop_compile import Policy
from dop_compile.errors import UnsupportedUsageError
from dop_compile.runtime.cache import PrunedCache
from tests.conversation import Conversation, assert_original_over_two_turns, conversation_batch, joined
from tests.families import FAMILIES
from tests.reference import reference_generate
from tests.support import Rows, assert_close, compile_eagerly, extended, make_batch, operations, reference

NAMES = ("llava", "qwen2_5_vl", "gemma3")
PROMPT: Rows = [[("text", 4), ("image",), ("text", 3)]]


def policy_for(name: str) -> Policy:
    """System and visual tokens are pruned apart, and four visual tokens of each turn enter."""
    layers = FAMILIES[name].num_layers
    pruned = operations(layers, ("visual",), ("mha_query", "mlp"), 1) + operations(layers, ("visual",), ("mha",), 3)
    pruned += operations(layers, ("system",), ("mha_key_value",), 2)
    return Policy.from_operations(layers, pruned, visual_tokens=4, reducer="given")


@pytest.mark.parametrize("own_cache", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_second_turn_without_an_image(name: str, own_cache: bool) -> None:
    """Also in a left-padded batch whose later turns are padded in the middle, where the original allows that:
    a sliding window counts padding, and M-RoPE has one position axis for all rows.
    """
    batch = conversation_batch(name, [*PROMPT, [("text", 2), ("image", 1), ("text", 2)]])
    policy = policy_for(name)
    cache = DynamicCache() if own_cache else None
    talk = Conversation(compile_eagerly(batch.model, policy), batch, cache)
    kept = batch.random_kept(4)
    assert talk.ask(kept) == reference_generate(batch.model, batch.inputs, policy, 3, kept)
    assert cache is None or talk.cache is cache
    assert isinstance(talk.cache, PrunedCache)
    for length in (3, 1):
        talk.say([[("text", length)], [("text", 2 if name == "llava" else length)]])
        found = talk.ask()
        assert found == reference_generate(batch.model, talk.asked.inputs, policy, 3, kept)


@pytest.mark.parametrize("name", ["llava", "gemma3"])
@pytest.mark.parametrize("first", ["image", "text"])
def test_second_turn_with_an_image(name: str, first: str) -> None:
    batch = conversation_batch(name, PROMPT if first == "image" else [[("text", 6)]])
    policy = policy_for(name)
    if first == "text":  # no system group then: in the conversation as one prompt the first turn would be system
        policy = policy.replace(pruned=frozenset(o for o in policy.pruned if o.group != "system"))
    talk = Conversation(compile_eagerly(batch.model, policy), batch)
    talk.ask([[0, 3, 4, 8]] if first == "image" else None)
    talk.say([[("text", 2), ("image",), ("text", 2)]])
    found = talk.ask([[1, 2, 5, 6]])
    assert found == reference_generate(batch.model, talk.asked.inputs, policy, 3, talk.kept)


@pytest.mark.parametrize("name", NAMES)
def test_full_policy_is_the_original_over_two_turns(name: str) -> None:
    assert_original_over_two_turns(conversation_batch(name, PROMPT))


@torch.no_grad()
def test_two_conversations_take_turns_on_one_model() -> None:
    """Qwen2.5-VL keeps rope deltas on the module: the other conversation's would shift every position."""
    rows = ([[("text", 2), ("image",), ("text", 3)]], [[("image", 1), ("text", 6), ("image", 2), ("text", 2)]])
    batches = [make_batch("qwen2_5_vl", row, seed=seed) for seed, row in enumerate(rows)]
    model = batches[0].model
    policy = Policy.depthwise(4, mha_query_depth=1, mha_key_value_depth=3, mlp_depth=2)
    compiled = compile_eagerly(model, policy)
    expected = [reference_generate(model, batch.inputs, policy, 5)[0] for batch in batches]
    model.base_model.rope_deltas = None
    outputs = [compiled(**batch.inputs) for batch in batches]
    found: list[list[int]] = [[], []]
    for _ in range(5):
        for index in (0, 1):
            found[index].append(int(outputs[index].logits[0, -1].argmax()))
            token = torch.tensor([found[index][-1:]])
            outputs[index] = compiled(input_ids=token, past_key_values=outputs[index].past_key_values)
    assert found == expected
    assert model.base_model.rope_deltas is None


@pytest.mark.parametrize("name", NAMES)
def test_cache_cropped_to_the_prompt_gives_the_same_answer_again(name: str) -> None:
    batch = conversation_batch(name, PROMPT)
    policy = policy_for(name)
    compiled = compile_eagerly(batch.model, policy)
    kept = batch.random_kept(4)
    talk = Conversation(compiled, batch)
    first = talk.ask(kept, tokens=4)
    length = batch.inputs["input_ids"].shape[1]
    talk.cache.crop(length - 1 - talk.cache.get_seq_length())
    assert talk.cache.get_seq_length() == length - 1
    mask = {"attention_mask": batch.inputs["attention_mask"]}
    again = compiled.generate(
        batch.inputs["input_ids"], **mask, past_key_values=talk.cache, max_new_tokens=4, do_sample=False
    )
    assert again[:, length:].tolist() == first


@pytest.mark.parametrize("keep", [1, 3, 4, 6, 8, 13])
@torch.no_grad()
def test_cache_cropped_anywhere(keep: int) -> None:
    """Also between removed tokens, inside the visual tokens, and with rows of different padding."""
    batch = make_batch("llama", [[("text", 14)], [("text", 14)], [("text", 11)]])
    assert batch.groups is not None
    layers = 4
    pruned = operations(layers, ("visual",), ("mlp", "mha_query"), 1) + operations(layers, ("visual",), ("mha",), 2)
    policy = Policy.from_operations(layers, pruned, visual_tokens=3, reducer="given")
    compiled = compile_eagerly(batch.model, policy)
    kept = [sorted(row) for row in batch.random_kept(3, seed=4)]
    ids, mask, groups = batch.inputs["input_ids"], batch.inputs["attention_mask"], batch.groups
    out = compiled(**batch.inputs, **batch.call_arguments(kept))
    cache = out.past_key_values
    cache.crop(keep - cache.get_seq_length())
    assert cache.get_seq_length() == keep
    new = torch.randint(16, 128, (3, 4), generator=torch.Generator().manual_seed(0))
    mask = torch.cat([mask[:, :keep], torch.ones(3, 4, dtype=torch.long)], 1)
    given = {"input_ids": new, "attention_mask": mask, "token_groups": torch.zeros_like(new)}
    logits = compiled(**given, past_key_values=cache).logits
    whole = replace(
        batch,
        inputs={"input_ids": torch.cat([ids[:, :keep], new], 1), "attention_mask": mask},
        groups=torch.cat([groups[:, :keep], torch.zeros_like(new)], 1),
    )
    left = [[k for k in row if k < n] for row, n in zip(kept, whole.counts, strict=True)]
    assert_close(logits, reference(whole, policy, left)[:, keep:])


@torch.no_grad()
def test_cache_counts_the_callers_tokens() -> None:
    batch = make_batch("llava", [*PROMPT, [("text", 5)]])
    policy = Policy.depthwise(4, mha_key_value_depth=2, visual_tokens=4)
    out = compile_eagerly(batch.model, policy)(**batch.inputs)
    cache: Any = out.past_key_values
    assert cache.get_seq_length() == batch.inputs["input_ids"].shape[1]
    assert cache.is_initialized
    # Four visual tokens of nine enter, and are keys in layers 0 and 1
    assert [layer.keys.shape[2] for layer in cache.layers] == [11, 11, 7, 7]


def rows_of(cache: PrunedCache) -> Tensor:
    return cache.layers[0].keys


@torch.no_grad()
def test_selected_and_repeated_rows_continue_as_themselves() -> None:
    """Rows are reduced differently, so each must keep its own columns."""
    batch = make_batch("llava", [*PROMPT, [("text", 2), ("image",), ("text", 1)], [("text", 6)]])
    policy = policy_for("llava").replace(positions="compact")
    compiled = compile_eagerly(batch.model, policy)
    kept = [[0, 1, 2, 8], [3, 4, 5, 6], []]
    new = torch.tensor([[20, 30], [40, 50], [60, 70]])
    whole = extended(batch, new)
    expected = reference(whole, policy, kept)[:, -2:]
    for change, order in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        cache = compiled(**batch.inputs, visual_indices=kept).past_key_values
        change(cache)
        assert len(rows_of(cache)) == len(order)
        mask = whole.inputs["attention_mask"][order]
        logits = compiled(input_ids=new[order], attention_mask=mask, past_key_values=cache).logits
        assert_close(logits, expected[order])


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_rows_that_lose_different_numbers_of_tokens_in_a_later_turn(name: str) -> None:
    """The shorter row is padded inside the conversation; sliding windows would count that, so it is refused there."""
    first = conversation_batch(name, [[("text", 6)], [("text", 4)]])
    image: Rows = [[("text", 1), ("image",), ("text", 2)]]
    length = make_batch(name, image).inputs["input_ids"].shape[1]
    second = make_batch(name, [*image, [("text", length)]], model=first.model)
    inputs = second.inputs
    layers = first.family.num_layers
    policy = Policy.depthwise(layers, mha_depth=3, visual_tokens=4, reducer="given")
    compiled = compile_eagerly(first.model, policy)
    cache = compiled(**first.inputs).past_key_values
    whole = joined(first, second)
    arguments = inputs | {"attention_mask": whole.inputs["attention_mask"], "past_key_values": cache}
    if name == "gemma3":
        with pytest.raises(UnsupportedUsageError, match="sliding windows would count the gaps"):
            compiled(**arguments, visual_indices=[[0, 2, 4, 6], []])
        return
    logits = compiled(**arguments, visual_indices=[[0, 2, 4, 6], []]).logits
    assert_close(logits, reference(whole, policy, [[0, 2, 4, 6], []])[:, 6:])
