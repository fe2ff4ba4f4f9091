"""Rankings inside the decoder against full attention maps of the untouched model, run stage by stage."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dop_compile import Policy, dop_compile
from dop_compile.errors import UnsupportedModelError
from dop_compile.passes import rank_tokens
from dop_compile.policy import baselines
from dop_compile.policy.ranking import Ranking, Stage
from dop_compile.runtime.call_rankings import observing
from tests.drawing import examples
from tests.families import FAMILIES as ALL_FAMILIES
from tests.rankings.check import check
from tests.support import assert_rows_match, compile_eagerly, make_batch

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "internvl")
CRITERIA = ("last_token", "next_layer", "text_raters", "product", "pivots")


def ranking(name: str, *stages: Stage) -> Ranking:
    """By a criterion; `next_layer` is `last_token` as the next layer sees it."""
    if name == "next_layer":
        return Ranking("last_token", stages, (("next_layer", True),))
    return Ranking(name, stages)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_stays_is_what_full_maps_say(name: str, criterion: str) -> None:
    check(name, Policy(4, ranking=ranking(criterion, Stage(0, fraction=0.7), Stage(2, tokens=2))))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_right_padding(criterion: str) -> None:
    check("llava", Policy(4, ranking=ranking(criterion, Stage(1, fraction=0.5))), padding="right")


@pytest.mark.parametrize("make", [baselines.fastv, baselines.pyramiddrop, baselines.sparsevlm, baselines.dart])
def test_published_policies(make: object) -> None:
    check("llava", make(4))  # type: ignore[operator]


@st.composite
def ranked_policies(draw: st.DrawFn) -> Policy:
    layers = draw(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True).map(sorted))
    fraction, tokens = st.floats(0, 1), st.integers(0, 6)
    stages = [
        Stage(layer, fraction=draw(fraction)) if draw(st.booleans()) else Stage(layer, tokens=draw(tokens))
        for layer in layers
    ]
    criterion = draw(st.sampled_from(CRITERIA))
    read = {(group, module) for group in ("visual", "text") for module in ("mha_key_value", "mha_query")}
    read_at = [layer + (criterion == "next_layer") for layer in layers]
    operations = [
        (group, layer, module)
        for group in ("system", "visual", "text")
        for layer in range(4)
        for module in ("mha_query", "mha_key_value", "mlp")
        if not (layer in read_at and (group, module) in read)
    ]
    pruned = draw(st.lists(st.sampled_from(operations), max_size=8, unique=True))
    return Policy.from_operations(4, pruned).replace(ranking=ranking(criterion, *stages))


@examples(9)
@given(ranked_policies())
def test_any_ranking_with_any_operations(policy: Policy) -> None:
    check("llava", policy, tokens=2)


def test_one_sample_is_ranked_as_in_a_batch() -> None:
    policy = Policy(4, ranking=Ranking("product", (Stage(0, fraction=0.5), Stage(1, fraction=0.25))))
    batch = make_batch("llava")
    compiled = compile_eagerly(batch.model, policy)
    together = compiled.generate(**batch.inputs, max_new_tokens=3, do_sample=False)
    for padding in ("left", "right"):
        other = make_batch("llava", padding=padding)
        positions = (other.mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            rows = compiled(**other.inputs, position_ids=positions).logits
        ends = other.mask.shape[1] - 1 - other.mask.flip(1).int().argmax(1)
        first = rows[torch.arange(len(ends)), ends].argmax(-1)
        assert torch.equal(first, together[:, batch.mask.shape[1]])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_generated_tokens_do_not_rate(criterion: str) -> None:
    """Without a cache the prompt is ranked anew in every step, as before."""
    batch = make_batch("llava")
    compiled = compile_eagerly(batch.model, Policy(4, ranking=ranking(criterion, Stage(1, tokens=3))))
    settings = {"max_new_tokens": 4, "do_sample": False}
    with_cache = compiled.generate(**batch.inputs, **settings)
    assert torch.equal(compiled.generate(**batch.inputs, **settings, use_cache=False), with_cache)


def test_beams_and_returned_sequences() -> None:
    batch = make_batch("llava")
    compiled = compile_eagerly(batch.model, Policy(4, ranking=Ranking("last_token", (Stage(1, tokens=3),))))
    settings = {"max_new_tokens": 3, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    with_cache = compiled.generate(**batch.inputs, **settings)
    assert torch.equal(compiled.generate(**batch.inputs, **settings, use_cache=False), with_cache)


def test_each_turn_ranks_its_own_picture() -> None:
    batch = make_batch("llava", padding="left")
    row = {"input_ids": batch.inputs["input_ids"][2:], "pixel_values": batch.inputs["pixel_values"][-1:]}
    row["input_ids"] = row["input_ids"][:, batch.mask[2]]
    tokens, visual = row["input_ids"].shape[1], batch.counts[2]
    policy = Policy(4, ranking=Ranking("product", (Stage(0, tokens=4), Stage(2, tokens=1))))
    compiled = compile_eagerly(batch.model, policy)
    with torch.no_grad():
        first = compiled(**row)
        kept = [len(layer.keys[0, 0]) for layer in first.past_key_values.layers]
        # The criterion reads attention over both turns, and ranks the second turn's picture alone
        second = compiled(**row, past_key_values=first.past_key_values)
    assert kept == [tokens, tokens - visual + 4, tokens - visual + 4, tokens - visual + 1]
    assert [len(layer.keys[0, 0]) for layer in second.past_key_values.layers] == [2 * count for count in kept]
    assert second.logits.shape[1] == tokens


@torch.no_grad()
def test_keys_of_the_next_layer_are_those_that_it_stores() -> None:
    """Behind what it holds of earlier turns, and of those that leave as well; they are not stored."""
    batch = make_batch("llava", padding="left")
    row = {"input_ids": batch.inputs["input_ids"][2:], "pixel_values": batch.inputs["pixel_values"][-1:]}
    row["input_ids"] = row["input_ids"][:, batch.mask[2]]
    visual = batch.counts[2]
    compiled = compile_eagerly(batch.model, Policy(4, ranking=ranking("next_layer", Stage(0, tokens=4))))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    with observing(lambda _, view: seen.append((view.key, view.left[0]))):
        first = compiled(**row)
        before = first.past_key_values.layers[1].keys.clone()
        second = compiled(**row, past_key_values=first.past_key_values)
    after, (keys, left) = second.past_key_values.layers[1].keys, seen[1]
    assert keys.shape[2] == before.shape[2] + row["input_ids"].shape[1]
    assert after.shape[2] == keys.shape[2] - visual + 4
    assert torch.equal(keys[:, :, : before.shape[2]], before)
    # Every stored key is one of those that were ranked by, in their order, and all that are not visual are stored
    new, stored = keys[0, :, before.shape[2] :], after[0, :, before.shape[2] :]
    distance = (new[:, :, None] - stored[:, None]).abs().amax(dim=(0, 3))
    places = distance.argmin(dim=0)
    assert distance.amin(dim=0).max() < 1e-5
    assert places.tolist() == sorted(set(places.tolist()))
    assert set((~left).nonzero()[:, 0].tolist()) <= set(places.tolist())


@pytest.mark.parametrize("name", ["cohere2_vision", "gemma3"])
def test_the_next_layer_may_have_a_window(name: str) -> None:
    layers = ALL_FAMILIES[name].num_layers
    check(name, Policy(layers, ranking=ranking("next_layer", *(Stage(n, tokens=7 - n) for n in range(layers - 1)))))


@pytest.mark.conformance
def test_inductor_equals_eager() -> None:
    batch = make_batch("llava")
    policy = Policy(4, ranking=ranking("next_layer", Stage(0, fraction=0.5), Stage(2, fraction=0.25)))
    with torch.no_grad():
        expected = compile_eagerly(batch.model, policy)(**batch.inputs).logits
        found = dop_compile(batch.model, policy)(**batch.inputs).logits
    assert_rows_match(found, expected, batch.mask, tolerance=1e-4)


def test_layers_without_attention_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_tokens, "eager_attention", lambda module: None)
    policy = Policy(4, ranking=Ranking("last_token", (Stage(1, tokens=3),)))
    with pytest.raises(UnsupportedModelError, match="LlamaAttention has no eager attention with weights"):
        compile_eagerly(make_batch("llava").model, {"full": Policy.full(4), "ranked": policy})
