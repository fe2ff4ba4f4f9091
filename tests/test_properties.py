"""Over random shapes, batches, paddings, image placements and policies: what must hold for every one of them.

Examples are derandomised, so a run tests the same ones on every machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dop_compile import Policy
from tests.drawing import examples
from tests.families import FAMILIES, Segment
from tests.strategies import policies
from tests.support import (
    Batch,
    assert_forward_matches,
    assert_rows_match,
    compile_eagerly,
    make_batch,
    reference,
    shared_model,
)

NAMES = ("llava", "qwen2_5_vl", "gemma3", "smolvlm", "cohere2_vision", "llama")
ALL_NAMES = tuple(FAMILIES)


@st.composite
def batches(draw: st.DrawFn, names: tuple[str, ...] = NAMES) -> Batch:
    """One to three rows of up to three images or videos, each between some text."""
    name = draw(st.sampled_from(names))
    family = FAMILIES[name]
    text = st.tuples(st.just("text"), st.integers(1, 5))
    image: st.SearchStrategy[Segment] = st.tuples(st.just("image"), st.integers(0, 2))
    visual = image | st.tuples(st.just("video"), st.integers(0, 1)) if family.has_video else image
    if family.is_text_only:
        row = st.lists(text, min_size=2, max_size=4)
    else:
        row = st.lists(visual | text, max_size=3).flatmap(
            lambda segments: text.map(lambda last: [*_apart(segments), last])
        )
    rows = draw(st.lists(row, min_size=1, max_size=3))
    model = shared_model(name, draw(st.sampled_from(("sdpa", "eager"))))
    return make_batch(name, rows, draw(st.sampled_from(("left", "right"))), draw(st.integers(0, 99)), model)


def _apart(segments: list[Segment]) -> list[Segment]:
    """Text between two images, without which some processors' placeholders would run together."""
    out: list[Segment] = []
    for segment in segments:
        if out and out[-1][0] != "text" and segment[0] != "text":
            out.append(("text", 1))
        out.append(segment)
    return out


@dataclass(frozen=True)
class Case:
    """A batch, a policy and, per row, the visual tokens that enter: best first, and the salient ones of them."""

    batch: Batch
    policy: Policy
    ranked: list[list[int]]

    @property
    def salient(self) -> list[list[int]] | None:
        fraction = self.policy.salient_fraction
        if fraction is None:
            return None
        return [row[: math.floor(fraction * len(row) + 0.5)] for row in self.ranked]

    def reference(self) -> torch.Tensor:
        return reference(self.batch, self.policy, self.ranked, self.salient)


@st.composite
def cases(draw: st.DrawFn, split: bool = False, reduction: bool = True) -> Case:
    batch = draw(batches())
    policy = draw(policies(batch.family.num_layers, split=split, reduction=reduction, max_visual_tokens=12))
    limit = 10**6 if policy.visual_tokens is None else policy.visual_tokens
    ranked = [draw(st.permutations(range(count)))[: min(limit, count)] for count in batch.counts]
    positions = "original" if batch.family.has_mrope else policy.positions
    return Case(batch, policy.replace(reducer="given", positions=positions), [list(row) for row in ranked])


@examples(12)
@given(batch=batches(ALL_NAMES), visual_tokens=st.sampled_from((None, 10**6)))
@torch.no_grad()
def test_full_budget_is_the_original_bit_by_bit(batch: Batch, visual_tokens: int | None) -> None:
    policy = Policy.full(batch.family.num_layers).replace(visual_tokens=visual_tokens)
    compiled = compile_eagerly(batch.model, policy)
    for use_cache in (True, False):
        expected = batch.model(**batch.inputs, use_cache=use_cache).logits
        assert torch.equal(compiled(**batch.inputs, **batch.call_arguments(), use_cache=use_cache).logits, expected)


@pytest.mark.parametrize("reduction", [False, True])
@examples(9)
@given(data=st.data())
def test_random_policies_are_the_reference(reduction: bool, data: st.DataObject) -> None:
    case = data.draw(cases(reduction=reduction))
    compiled = compile_eagerly(case.batch.model, case.policy)
    assert_forward_matches(compiled, case.batch, case.policy, case.ranked)


@examples(9)
@given(case=cases(split=True))
def test_split_policies_are_the_reference(case: Case) -> None:
    compiled = compile_eagerly(case.batch.model, case.policy)
    assert_forward_matches(compiled, case.batch, case.policy, case.ranked, case.salient)


@examples(6)
@given(case=cases(), rows=st.integers(0, 4), cached=st.booleans())
@torch.no_grad()
def test_optional_passes_change_no_requested_number(case: Case, rows: int, cached: bool) -> None:
    batch = case.batch
    arguments = batch.inputs | batch.call_arguments(case.ranked) | {"logits_to_keep": rows, "use_cache": cached}
    results = []
    for disabled in ([], ["remove_dead"], ["narrow_residual"], ["share_frozen"]):
        results.append(compile_eagerly(batch.model, case.policy, disable_passes=disabled)(**arguments))
    first = results[0]
    tokens = batch.mask[:, -first.logits.shape[1] :]
    for other in results[1:]:
        scale = first.logits[tokens].abs().amax() if tokens.any() else 1.0
        assert ((other.logits - first.logits)[tokens].abs() <= 1e-5 * scale).all()
        if cached:
            for layer, entries in first.past_key_values.entries.items():
                shapes = {result.past_key_values.layers[layer].keys.shape for result in (first, other)}
                assert len(shapes) == 1, entries


def groups_entering(case: Case) -> list[list[str]]:
    """Per row the groups of the tokens that enter, in sequence order."""
    batch, salient = case.batch, case.salient
    out = []
    for row, (valid, visual) in enumerate(zip(batch.mask, batch.visual, strict=True)):
        names: list[str] = []
        ordinal = 0
        first = int(visual.nonzero()[0]) if visual.any() else 0
        for column in valid.nonzero()[:, 0].tolist():
            if visual[column]:
                name = "visual" if salient is None else "visual_rest"
                if salient is not None and ordinal in salient[row]:
                    name = "visual_salient"
                if ordinal in case.ranked[row]:
                    names.append(name)
                ordinal += 1
            elif batch.groups is not None:
                names.append("system" if batch.groups[row, column] == 2 and visual.any() else "text")
            else:
                names.append("system" if column < first else "text")
        out.append(names)
    return out


@examples(12)
@given(case=cases() | cases(split=True))
@torch.no_grad()
def test_each_layer_stores_what_its_policy_keeps_as_keys(case: Case) -> None:
    batch, policy = case.batch, case.policy
    compiled = compile_eagerly(batch.model, policy)
    cache = compiled(**batch.inputs, **batch.call_arguments(case.ranked), logits_to_keep=1).past_key_values
    groups = groups_entering(case)
    assert cache.get_seq_length() == batch.mask.shape[1]
    for layer in range(policy.num_layers):
        kept = [sum(policy.keeps(group, layer, "mha_key_value") for group in row) for row in groups]
        stored = cache.layers[layer]
        assert stored.keys.shape == stored.values.shape
        width = stored.keys.shape[2]
        entries = cache.entries[layer]
        if entries.slots is None:  # every slot is stored, padding too
            assert width == cache.slots_seen
            assert kept == [len(row) for row in groups]
            continue
        # A layer without any key holds one entry of padding, so that no shape is zero
        assert width == max(*kept, 1)
        valid = torch.ones(len(kept), width) if entries.valid is None else entries.valid
        assert valid.sum(1).tolist() == kept


@examples(6)
@given(case=cases())
@torch.no_grad()
def test_decoding_step_by_step_is_the_reference_of_the_longer_prompt(case: Case) -> None:
    """Two more tokens, given to the cache one at a time: where text is not pruned they are text like any other."""
    policy = case.policy.replace(pruned=frozenset(op for op in case.policy.pruned if op.group != "text"))
    batch = case.batch
    if policy.positions == "compact" or batch.family.has_mrope or batch.inputs["attention_mask"][:, -1].min() == 0:
        return
    compiled = compile_eagerly(batch.model, policy)
    cache = compiled(**batch.inputs, **batch.call_arguments(case.ranked)).past_key_values
    tokens = torch.randint(16, 128, (len(batch.counts), 2), generator=torch.Generator().manual_seed(0))
    inputs = batch.inputs | {"input_ids": torch.cat([batch.inputs["input_ids"], tokens], 1)}
    for name in ("attention_mask", batch.family.type_ids):
        if name:
            value = int(name == "attention_mask")
            inputs[name] = torch.nn.functional.pad(batch.inputs[name], (0, 2), value=value)
    groups = None if batch.groups is None else torch.nn.functional.pad(batch.groups, (0, 2))
    whole = Batch(batch.family, batch.model, inputs, groups)
    expected = reference(whole, policy, case.ranked)
    length = batch.mask.shape[1]
    for step in range(2):
        mask = inputs["attention_mask"][:, : length + step + 1]
        logits = compiled(input_ids=tokens[:, step : step + 1], attention_mask=mask, past_key_values=cache).logits
        assert_rows_match(logits, expected[:, : length + step + 1], mask.bool())
