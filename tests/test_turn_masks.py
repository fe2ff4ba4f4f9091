"""Masks that an outer model builds, in later turns: from values per token of the conversation or of its last turn.

The reference is the whole conversation as one prompt where that is the same for the original; elsewhere the decoder
itself, on the tokens that are left, under a mask written out by hand.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from dop_compile import Policy
from dop_compile.errors import UnsupportedUsageError
from tests.conformance.table import EXACT
from tests.reference import reference_generate, text_decoder
from tests.support import Batch, Rows, assert_close, compile_eagerly, make_batch, operations
from tests.support import reference as padded_reference

IMAGE: Rows = [[("text", 4), ("image",), ("text", 3)]]
TEXT: Rows = [[("text", 5)]]
ROWS: Rows = [*IMAGE, [("text", 2), ("image",), ("text", 2)]]
KEPT = [0, 2, 8]
BLOCKS_OF_RUNS = ("gemma3", "gemma4_unified")
"""Every image is a bidirectional block of its own, which turns do not share."""


def policy_of(batch: Batch) -> Policy:
    layers = batch.family.num_layers
    pruned = operations(layers, ("visual",), ("mha_query", "mlp"), 2)
    return Policy.from_operations(layers, pruned, visual_tokens=3, reducer="given")


def is_per_token(name: str) -> bool:
    return name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def conversation(name: str, turns: list[Rows]) -> tuple[list[Batch], Batch]:
    """The turns, and all of them as one prompt."""
    family = EXACT[name]
    model = family.build()
    made = [make_batch(family, rows, seed=seed, model=model) for seed, rows in enumerate(turns)]
    inputs = {
        n: torch.cat([turn.inputs[n] for turn in made if n in turn.inputs], int(is_per_token(n)))
        for n in made[0].inputs
    }
    rows = len(turns[0])
    towers = [{n: v[row::rows] for n, v in inputs.items() if not is_per_token(n)} for row in range(rows)]
    return made, replace(made[0], inputs=inputs, towers=towers, sizes=None)


def run_turns(model: Any, turns: list[Batch], whole: Batch, types: str, last: str, **settings: Any) -> Any:
    """Logits of the last turn's rows by `forward`, or the output of `generate`; `types` per token are of all turns or
    of each."""
    name, cache, past = turns[0].family.type_ids or "", None, 0
    for turn in turns:
        end = past + turn.inputs["input_ids"].shape[1]
        given = {n: v for n, v in turn.inputs.items() if not is_per_token(n)}
        given[name] = whole.inputs[name][:, 0 if types == "whole" else past : end]
        given["attention_mask"] = whole.inputs["attention_mask"][:, :end]
        if turn.visual.any():
            given["visual_indices"] = [KEPT] * len(turn.mask)
        if last == "generate" and turn is turns[-1]:
            ids = whole.inputs["input_ids"][:, :end]
            return model.generate(ids, **given, past_key_values=cache, do_sample=False, **settings)
        output = model(input_ids=turn.inputs["input_ids"], **given, past_key_values=cache, use_cache=True)
        cache, past = output.past_key_values, end
    return output.logits


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "turns"),
    [
        ("gemma3", [IMAGE, TEXT]),
        ("gemma3", [IMAGE, TEXT, IMAGE]),
        ("gemma3", [ROWS, TEXT * 2]),
        ("gemma4_unified", [IMAGE, TEXT]),
        ("gemma4_unified", [ROWS, IMAGE * 2]),
    ],
)
def test_types_of_the_whole_conversation(name: str, turns: list[Rows]) -> None:
    """Also without a new image with those of the last turn alone, which the original reads as those of its first
    columns; there are none of images among them."""
    made, whole = conversation(name, turns)
    policy = policy_of(whole)
    compiled = compile_eagerly(whole.model, policy, debug=False)
    kept = [[at + 9 * turn for turn in range(count // 9) for at in KEPT] for count in whole.counts]
    expected = padded_reference(whole, policy, kept)[:, -made[-1].mask.shape[1] :]
    for types in ("whole", "new") if turns[-1][0] == TEXT[0] else ("whole",):
        assert_close(run_turns(compiled, made, whole, types, "forward"), expected, 5e-5)  # weights magnify rounding
    if len(turns[0]) == 1:  # of padded rows generate numbers the tokens otherwise
        settings = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
        output = run_turns(compiled, made, whole, "whole", "generate", **settings)
        assert_close(output.logits[0], expected[:, -1])


@torch.no_grad()
@pytest.mark.parametrize("name", BLOCKS_OF_RUNS)
def test_looked_up_candidates_stand_behind_the_types(name: str) -> None:
    """The call that holds the prompt holds candidates too, and `mm_token_type_ids` are those of the prompt alone."""
    _, whole = conversation(name, [[[("text", 8), ("image",)]], TEXT])
    whole.model.get_output_embeddings().weight[:16] = 0
    ids = whole.inputs["input_ids"]
    ids[0, -2:] = ids[0, 1:3]  # what follows these is looked up
    policy = policy_of(whole)
    settings = {"max_new_tokens": 5, "do_sample": False, "prompt_lookup_num_tokens": 3}
    found = compile_eagerly(whole.model, policy, debug=False).generate(
        **whole.inputs, visual_indices=[KEPT], **settings
    )
    expected = reference_generate(whole.model, whole.inputs, policy, 5, [KEPT], towers=whole.towers)
    assert found[:, ids.shape[1] :].tolist() == expected


@torch.no_grad()
def test_beams_in_a_second_turn() -> None:
    """The same as beams of the conversation as one prompt."""
    (first, _), whole = conversation("gemma3", [IMAGE, TEXT])
    whole.model.get_output_embeddings().weight[:16] = 0
    compiled = compile_eagerly(whole.model, policy_of(whole), debug=False)
    settings = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    expected = compiled.generate(**whole.inputs, visual_indices=[KEPT], **settings)
    cache = compiled(**first.inputs, visual_indices=[KEPT]).past_key_values
    cache.batch_repeat_interleave(3)
    inputs = {n: v for n, v in whole.inputs.items() if n != "pixel_values"}
    assert torch.equal(compiled.generate(**inputs, past_key_values=cache, **settings), expected)


@torch.no_grad()
@pytest.mark.parametrize("types", ["whole", "new"])
@pytest.mark.parametrize("name", ["paligemma", "molmo2"])
def test_blocks_that_span_turns(name: str, types: str) -> None:
    """All prefix or image tokens are one block; of types of the last turn alone the original takes the first for
    those of the conversation's first columns."""
    turns, whole = conversation(name, [IMAGE, IMAGE])
    model, family = whole.model, whole.family
    count = turns[0].counts[0]
    kept = [0, count - 1]
    compiled = compile_eagerly(model, Policy.full(family.num_layers).replace(reducer="given"))
    decoder, embeds = text_decoder(model), []
    hook = decoder.register_forward_pre_hook(
        lambda _, __, given: embeds.append(given["inputs_embeds"]), with_kwargs=True
    )
    for turn in turns:
        model(**turn.inputs)
    hook.remove()
    type_name = family.type_ids or ""
    in_block = whole.inputs[type_name] == (0 if family.has_bidirectional_prefix else 1)
    length = turns[0].mask.shape[1]
    blocks = [in_block[:, :length], in_block if types == "whole" else torch.zeros_like(in_block)]
    if types == "new":
        blocks[1][:, :length] = in_block[:, length:]
    cache, expected, left, found_cache, found = DynamicCache(), None, [], None, None
    for number, turn in enumerate(turns):
        columns = torch.arange(length)
        visual = columns[turn.visual[0]]
        stays = torch.ones(length, dtype=torch.bool)
        stays[visual] = False
        stays[visual[kept]] = True
        left += (columns[stays] + number * length).tolist()
        new = torch.tensor(left[-int(stays.sum()) :])
        keys = torch.tensor(left)
        block = torch.nn.functional.pad(blocks[number], (0, 2 * length - blocks[number].shape[1]))[0]
        mask = (keys <= new[:, None]) | (block[new][:, None] & block[keys])
        given = {"attention_mask": mask[None, None], "position_ids": new[None], "past_key_values": cache}
        expected = decoder(inputs_embeds=embeds[number][:, stays], **given).last_hidden_state
        given = {n: v for n, v in turn.inputs.items() if n != type_name}
        end = (number + 1) * length
        given[type_name] = whole.inputs[type_name][:, number * length if types == "new" else 0 : end]
        given |= {"attention_mask": torch.ones(1, end, dtype=torch.long), "past_key_values": found_cache}
        output = compiled(**given, visual_indices=[kept], use_cache=True)
        found_cache, found = output.past_key_values, output.logits[:, stays]
    assert_close(found, model.get_output_embeddings()(expected))


@torch.no_grad()
def test_refused_where_a_block_reaches_behind_the_window_of_an_earlier_turn() -> None:
    """The original's sliding layers have forgotten those tokens of the block, the compiled model has not."""
    turns, whole = conversation("paligemma2", [IMAGE, IMAGE])
    compiled = compile_eagerly(whole.model, policy_of(whole), debug=False)
    with pytest.raises(UnsupportedUsageError, match="before the sliding window"):
        run_turns(compiled, turns, whole, "whole", "forward")
    run_turns(compiled, turns, whole, "new", "forward")
