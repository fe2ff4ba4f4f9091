"""Runs that go on from a stored residual stream, against whole runs: of the oracle and of the compiled model."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dop_compile import Policy, dop_compile
from dop_compile.policy.costs import prefill_flops
from dop_compile.replay import Replay
from dop_compile.runtime.cache import PrunedCache
from tests.conformance.table import EXACT
from tests.drawing import examples
from tests.families import FAMILIES, IMAGE, Segment
from tests.support import (
    MODULES,
    ONE_IMAGE,
    Batch,
    assert_close,
    make_batch,
    original_decoder_forbidden,
    reference,
    uniform_kept,
)

ROW: list[list[Segment]] = [[("text", 3), ("image",), ("text", 3), ("image", 1), ("text", 4)]]
GROUPS = ("system", "visual", "text")


@functools.cache
def compiled(name: str) -> Any:
    batch = make_batch(name)
    return dop_compile(batch.model, Policy.full(batch.family.num_layers), backend="eager")


@functools.cache
def prepared(name: str, rows: int = 1) -> tuple[Batch, Replay]:
    """A prompt and its replay that can go on from every layer."""
    batch = make_batch(name, ROW)
    return batch, Replay(compiled(name), batch.inputs, depths=range(batch.family.num_layers), rows=rows)


@st.composite
def policies_from_a_depth(draw: st.DrawFn, layers: int, compact: bool) -> Policy:
    """Prunes nothing before some layer, and anything after it; in a third of the cases it reduces tokens too."""
    first = draw(st.integers(0, layers))
    reduced = draw(st.sampled_from([None, None, 0, 4, 7]))
    positions = draw(st.sampled_from(("original", "compact"))) if compact else "original"
    later = [(group, layer, module) for group in GROUPS for layer in range(first, layers) for module in MODULES]
    pruned = draw(st.sets(st.sampled_from(later))) if later else set()
    return Policy.from_operations(layers, pruned, visual_tokens=reduced, positions=positions)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
@examples(8)
@given(data=st.data())
def test_any_policy_gives_the_logits_of_a_whole_run(name: str, data: st.DataObject) -> None:
    batch, replay = prepared(name, rows=2)
    policy = data.draw(policies_from_a_depth(batch.family.num_layers, compact=not batch.family.has_mrope))
    kept = None if policy.visual_tokens is None else uniform_kept(batch, policy.visual_tokens)
    expected = reference(batch, policy, kept)[:, -2:]
    first = replay.first_layer(policy)
    earliest = min((operation.layer for operation in policy.pruned), default=batch.family.num_layers - 1)
    assert first == (0 if policy.visual_tokens is not None else earliest)
    assert_close(replay.logits(policy), expected)


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_the_compiled_models_own_forward_agrees(name: str) -> None:
    batch, replay = prepared(name)
    layers = batch.family.num_layers
    tiers = {
        "apart": Policy.depthwise(layers, mha_query_depth=1, mha_key_value_depth=3, mlp_depth=2),
        "late": Policy.depthwise(layers, mlp_depth=layers - 1),
    }
    whole = dop_compile(batch.model, tiers, backend="eager")
    for tier, policy in tiers.items():
        assert replay.first_layer(policy) > 0
        with torch.no_grad():
            expected = whole(**batch.inputs, tier=tier).logits[:, -1:]
        assert_close(replay.logits(policy), expected)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_padded_batch(name: str) -> None:
    batch = make_batch(name)
    replay = Replay(compiled(name), batch.inputs, depths=(1, 2))
    for policy in (
        Policy.depthwise(4, mha_query_depth=2, mlp_depth=3),
        Policy.depthwise(4, mha_depth=1, visual_tokens=4),
    ):
        kept = None if policy.visual_tokens is None else uniform_kept(batch, policy.visual_tokens)
        assert_close(replay.logits(policy), reference(batch, policy, kept)[:, -1:])


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen3_vl", "gemma3", "video_llava"])
def test_the_original_logits_are_the_untouched_models(name: str) -> None:
    batch, replay = prepared(name)
    with torch.no_grad():
        expected = batch.model(**batch.inputs, logits_to_keep=1, use_cache=False).logits
    assert torch.equal(replay.original, expected)
    assert_close(replay.logits(Policy.full(batch.family.num_layers)), expected)


@pytest.mark.parametrize("as_function", [False, True])
def test_groups_that_the_model_was_compiled_with(as_function: bool) -> None:
    """They are the prompt's, and say nothing of the rows that the head is asked for."""
    batch = make_batch("llama")
    groups = batch.call_arguments()["token_groups"]
    given: Any = (lambda ids: groups) if as_function else groups
    policy = Policy.depthwise(4, mha_depth=2, mlp_depth=3)
    whole = dop_compile(batch.model, Policy.full(4), backend="eager", token_groups=given)
    assert_close(Replay(whole, batch.inputs, depths=(2,)).logits(policy), reference(batch, policy)[:, -1:])


def test_a_run_begins_at_the_last_stored_depth_before_it_prunes() -> None:
    batch = make_batch("llava", ROW)
    replay = Replay(compiled("llava"), batch.inputs, depths=(3, 1))
    begins = {
        Policy.full(4): 3,
        Policy.depthwise(4, mlp_depth=3): 3,
        Policy.depthwise(4, mlp_depth=2): 1,
        Policy.depthwise(4, mha_depth=3, mlp_depth=1): 1,
        Policy.depthwise(4, mlp_depth=0): 0,
        Policy.full(4).replace(visual_tokens=5): 0,
        Policy.from_operations(4, [("visual", 3, "mlp")], salient_fraction=0.5): 0,
    }
    assert {policy: replay.first_layer(policy) for policy in begins} == begins
    nothing = Replay(compiled("llava"), batch.inputs)
    assert {nothing.first_layer(policy) for policy in begins} == {0}
    late = Policy.depthwise(4, mlp_depth=3)
    assert_close(replay.logits(late), nothing.logits(late))


# --- what is run again, and what is left behind


def test_neither_tower_nor_original_decoder_runs_again_and_nothing_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, replay = prepared("llava")
    policies = (Policy.depthwise(4, mlp_depth=2), Policy.full(4).replace(visual_tokens=3))
    before = [replay.logits(policy) for policy in policies]

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("this was not to run")

    monkeypatch.setattr(PrunedCache, "store", forbidden)
    tower = batch.model.base_model.vision_tower.register_forward_pre_hook(forbidden)
    try:
        with original_decoder_forbidden(batch.model):
            for policy, logits in zip(policies, before, strict=True):
                assert torch.equal(replay.logits(policy), logits)
    finally:
        tower.remove()


def test_layers_before_the_stored_depth_are_not_run() -> None:
    batch = make_batch("llava", ROW)
    ran: list[int] = []
    model = FAMILIES["llava"].build()
    layers = model.get_decoder().layers
    for number, layer in enumerate(layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    replay = Replay(dop_compile(model, Policy.full(4), backend="eager"), batch.inputs, depths=(2,))
    ran.clear()
    replay.logits(Policy.depthwise(4, mha_query_depth=3))
    assert ran == [2, 3]


def test_the_model_is_left_as_it_was() -> None:
    batch = make_batch("qwen2_5_vl", ROW)
    model = batch.model
    hooks = [dict(module._forward_pre_hooks) for module in model.modules()]
    with torch.no_grad():
        before = model(**batch.inputs).logits
    Replay(compiled("qwen2_5_vl"), batch.inputs, depths=(1, 3)).logits(Policy.depthwise(4, mlp_depth=2))
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == hooks
    with torch.no_grad():
        assert torch.equal(model(**batch.inputs).logits, before)


def test_hooks_go_also_when_the_original_fails() -> None:
    model = FAMILIES["llava"].build()
    batch = make_batch("llava", ROW)
    whole = dop_compile(model, Policy.full(4), backend="eager")
    model.get_decoder().norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Replay(whole, batch.inputs, depths=(1, 2))
    assert not any(layer._forward_pre_hooks for layer in model.get_decoder().layers)


# --- what it costs


def test_the_reported_flops_are_those_that_pytorch_counts() -> None:
    """With eager attention every product of matrices is counted, also the one for the logits."""
    batch = make_batch("qwen2_5_vl", ONE_IMAGE, model=FAMILIES["qwen2_5_vl"].build(attn="eager"))
    replay = Replay(dop_compile(batch.model, Policy.full(4), backend="eager"), batch.inputs, depths=(1, 2, 3))
    logits = 2 * 64 * 128
    for policy in (
        Policy.full(4),
        Policy.depthwise(4, mha_depth=2),
        Policy.depthwise(4, mha_query_depth=1, mlp_depth=3),
        Policy.depthwise(4, mha_depth=3, mlp_depth=2, visual_tokens=5),
    ):
        replay.logits(policy)  # traced outside the counter, which would count the example values
        with FlopCounterMode(display=False) as counter:
            replay.logits(policy)
        assert counter.get_total_flops() == replay.flops(policy) + logits


def test_the_original_costs_a_full_prefill() -> None:
    batch, replay = prepared("llava")
    system, visual, text = replay.counts
    assert replay.original_flops == prefill_flops(batch.model.config, Policy.full(4), system, visual, text)
    late, early = Policy.depthwise(4, mlp_depth=3), Policy.depthwise(4, mlp_depth=1)
    assert replay.flops(late) < replay.flops(early) < replay.original_flops


# --- token counts


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        ("llava", ROW, (3, 18, 7)),
        ("llava", [[("image",), ("text", 4)]], (0, 9, 4)),
        ("internvl", ROW, (4, 18, 10)),  # with the markers around the images
        ("qwen2_5_vl", [[("text", 2), ("video",), ("text", 3)]], (3, 8, 4)),
        ("smolvlm", ONE_IMAGE, (5, 9, 4)),
    ],
)
def test_counts_of_a_prompt(name: str, rows: list[list[Segment]], expected: tuple[int, int, int]) -> None:
    batch = make_batch(name, rows)
    replay = Replay(compiled(name), batch.inputs)
    assert replay.counts == expected
    assert sum(replay.counts) == batch.inputs["input_ids"].shape[1]
    assert replay.counts[1] == batch.counts[0]


def test_newlines_inside_an_image_are_text_as_no_policy_drops_them() -> None:
    batch = make_batch("llava_next", ONE_IMAGE)
    system, visual, text = Replay(compiled("llava_next"), batch.inputs).counts
    placeholders = int((batch.inputs["input_ids"] == IMAGE).sum())
    assert visual == batch.counts[0] < placeholders
    assert (system, text) == (4, 3 + placeholders - visual)


def test_padding_is_not_counted() -> None:
    batch = make_batch("llava", [ROW[0], [("text", 60)]])
    inputs = {
        name: value[:1] if name in ("input_ids", "attention_mask") else value for name, value in batch.inputs.items()
    }
    assert inputs["input_ids"].shape == (1, 60)
    assert Replay(compiled("llava"), inputs).counts == (3, 18, 7)


def test_a_prompt_without_images_is_all_text() -> None:
    batch = make_batch("llava", [[("text", 9)]])
    replay = Replay(compiled("llava"), batch.inputs, depths=(1, 2))
    assert replay.counts == (0, 0, 9)
    assert_close(replay.logits(Policy.depthwise(4, mha_depth=0, mlp_depth=2)), replay.original)


def test_forced_tokens_are_text_behind_the_prompt() -> None:
    batch, _ = prepared("llava")
    more = torch.tensor([[20, 21, 22]])
    inputs = batch.inputs | {
        "input_ids": torch.cat([batch.inputs["input_ids"], more], 1),
        "attention_mask": torch.cat([batch.inputs["attention_mask"], torch.ones_like(more)], 1),
    }
    prompt = batch.inputs["input_ids"].shape[1]
    replay = Replay(compiled("llava"), inputs, depths=(1, 2), prompt_tokens=prompt, rows=4)
    assert replay.counts == (3, 18, 10)
    # Generated tokens are never pruned, whatever the policy does to text
    policy = Policy.from_operations(4, [(group, 2, module) for group in GROUPS for module in MODULES])
    whole = dop_compile(batch.model, policy, backend="eager")
    with torch.no_grad():
        steps = [whole(**batch.inputs, use_cache=True)]
        for token in more[0]:
            cache = steps[-1].past_key_values
            length = torch.ones(1, cache.get_seq_length() + 1, dtype=torch.long)
            steps.append(whole(input_ids=token.view(1, 1), attention_mask=length, past_key_values=cache))
    expected = torch.cat([step.logits[:, -1:] for step in steps], 1)
    assert_close(replay.logits(policy), expected)


# --- text-only models


def test_groups_of_a_text_only_model() -> None:
    batch = make_batch("llama")
    groups = batch.groups
    assert groups is not None
    row = {name: value[1:2, -14:] for name, value in batch.inputs.items()}
    own = Batch(batch.family, batch.model, row, groups[1:2, -14:])
    replay = Replay(compiled("llama"), {**row, "token_groups": own.groups}, depths=(1, 2, 3))
    assert own.groups is not None
    assert replay.counts == tuple(int((own.groups == code).sum()) for code in (2, 1, 0))
    for policy in (
        Policy.depthwise(4, mha_depth=2, mlp_depth=3),
        Policy.depthwise(4, system_mha_depth=1, mlp_depth=2),
        Policy.depthwise(4, visual_tokens=3, mha_query_depth=1),
    ):
        kept = None if policy.visual_tokens is None else uniform_kept(own, policy.visual_tokens)
        assert_close(replay.logits(policy), reference(own, policy, kept)[:, -1:])


def test_without_groups_a_text_only_model_has_nothing_to_prune() -> None:
    row = make_batch("llama", [[("text", 8)], [("text", 8)]]).inputs
    replay = Replay(compiled("llama"), {name: value[:1] for name, value in row.items()}, depths=(1, 2))
    assert replay.counts == (0, 0, 8)
    assert_close(replay.logits(Policy.depthwise(4, mha_depth=1, mlp_depth=0)), replay.original)


def test_inputs_without_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="inputs: expected input_ids among them, got pixel_values"):
        Replay(compiled("llava"), {"pixel_values": torch.zeros(1, 3, 24, 24)})


def test_a_deeper_model_than_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Depths beyond the decoder are an error of the caller, not a silent start from the beginning."""
    batch = make_batch("llava", ROW)
    with pytest.raises(IndexError):
        Replay(compiled("llava"), batch.inputs, depths=(9,))
    layers: nn.ModuleList = batch.model.get_decoder().layers
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_sizes_of_whole_sequences_where_tokens_have_left_at_the_start() -> None:
    """Llama 4's layers ask for the number of all tokens, though only text enters the layer that is gone on from."""
    batch = make_batch(EXACT["llama4_text"])  # transformers 5.24 cannot run the one with images itself
    inputs = batch.inputs | batch.call_arguments()
    layers = batch.family.num_layers
    policy = Policy.depthwise(layers, mha_depth=layers - 1, mlp_depth=layers - 1)
    model = dop_compile(batch.model, policy, backend="eager", debug=True)
    with torch.no_grad():
        expected = model(**inputs, logits_to_keep=1).logits
    assert_close(Replay(model, inputs, depths=[layers - 1]).logits(policy), expected)


def test_nothing_is_hooked_that_another_thread_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a replay notes is noted on copies: a hook on the shared layers would stop other threads' calls."""

    def refuse(module: nn.Module, *_: Any, **__: Any) -> None:
        raise AssertionError(f"a hook on {type(module).__name__}")

    batch = make_batch("llava", ONE_IMAGE)
    made = compiled("llava")
    monkeypatch.setattr(nn.Module, "register_forward_hook", refuse)
    monkeypatch.setattr(nn.Module, "register_forward_pre_hook", refuse)
    replay = Replay(made, batch.inputs, depths=range(batch.family.num_layers))
    with torch.no_grad():
        assert torch.equal(replay.original, batch.model(**batch.inputs, logits_to_keep=1).logits)
