"""`explain` tells what the compiled graph really does: against counted FLOPs and the tensors in a real cache."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dop_compile import Policy, dop_compile, executed_flops, explain, prefill_flops
from dop_compile.reports.table import show_bytes, show_flops
from tests.conformance.text_only import TEXT_ONLY as SHARING
from tests.drawing import examples
from tests.families import FAMILIES, HIDDEN, LAYERS, VOCAB
from tests.strategies import policies
from tests.support import random_operations

SPLIT = {"mha_query_depth": 1, "mha_key_value_depth": 3, "mlp_depth": 1}
NO_KEYS = Policy.from_operations(LAYERS, [(group, 2, "mha_key_value") for group in ("system", "visual", "text")])
TEXT_ONLY = ("llama", "qwen2")
DRAWN = examples(8)  # every example is compiled
COUNTS = st.tuples(st.integers(0, 6), st.integers(0, 9), st.integers(2, 7))


@functools.cache
def model_of(family: str) -> Any:
    return FAMILIES[family].build(attn="eager")


def compiled_with(family: str, policy: Any) -> Any:
    return dop_compile(model_of(family), policy, backend="eager")


def prompt(system: int, visual: int, text: int) -> dict[str, Tensor]:
    # A vision-language model's prompt without visual tokens has no system part: the costs follow that rule
    groups = torch.tensor([[2 if visual else 0] * system + [1] * visual + [0] * text])
    return {"input_ids": torch.arange(groups.shape[1])[None] % VOCAB, "token_groups": groups}


def run(compiled: Any, counts: tuple[int, int, int], rows: int, use_cache: bool = True) -> tuple[int, Any]:
    """FLOPs counted in the decoder's layers, and the cache."""
    call = functools.partial(compiled, **prompt(*counts), logits_to_keep=rows, use_cache=use_cache)
    with torch.no_grad():
        call()  # traces, with example tensors that would be counted
        with FlopCounterMode(display=False) as counter:
            output = call()
    lm_head = 2 * output.logits.shape[1] * HIDDEN * VOCAB
    return counter.get_total_flops() - lm_head, output.past_key_values


# --- against what runs


@pytest.mark.parametrize("family", TEXT_ONLY)
@DRAWN
@given(
    policy=policies(LAYERS, split=None, max_visual_tokens=12),
    counts=COUNTS,
    rows=st.sampled_from([0, 1, 2]),
    use_cache=st.booleans(),
)
@example(policy=NO_KEYS, counts=(2, 3, 4), rows=1, use_cache=True)
@example(policy=NO_KEYS, counts=(2, 3, 4), rows=0, use_cache=False)
def test_flops_and_bytes_are_those_that_pytorch_counts(
    family: str, policy: Policy, counts: tuple[int, int, int], rows: int, use_cache: bool
) -> None:
    compiled = compiled_with(family, policy)
    counted, cache = run(compiled, counts, rows, use_cache)
    names = dict(zip(("system", "visual", "text"), counts, strict=True))
    assert executed_flops(compiled, **names, rows=rows, use_cache=use_cache) == counted
    result = explain(compiled, **names, rows=rows, use_cache=use_cache)
    cost = result.summary
    assert sum(layer.flops or 0 for layer in result.layers) == cost.executed_flops == counted
    stored = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers] if use_cache else [0] * LAYERS
    assert [layer.kv_bytes for layer in result.layers] == stored
    assert cost.kv_bytes == sum(stored)
    assert cost.eq11_flops is not None
    assert cost.original_flops is not None
    assert cost.eq11_flops <= cost.original_flops
    if not any(op.group == "text" for op in policy.pruned):
        # With text in every module no set is empty: an empty one still costs the padding that stands in its place
        assert counted <= cost.eq11_flops


@pytest.mark.parametrize(("rows", "use_cache"), [(0, True), (1, True), (2, False)])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_layers_that_read_earlier_keys(seed: int | None, rows: int, use_cache: bool) -> None:
    layers, pruned = 6, [] if seed is None else random_operations(6, seed)
    model = SHARING["gemma4_unified_shared_text"].build(attn="eager")
    compiled = dop_compile(model, Policy.from_operations(layers, pruned), backend="eager")
    counted, cache = run(compiled, (2, 5, 4), rows, use_cache)
    result = explain(compiled, system=2, visual=5, text=4, rows=rows, use_cache=use_cache)
    assert sum(layer.flops or 0 for layer in result.layers) == counted
    stored = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers] if use_cache else [0] * 3
    assert [layer.kv_bytes for layer in result.layers] == [*stored, 0, 0, 0]
    assert [layer.note.partition("reads the keys and values of ")[2] for layer in result.layers[3:]] == [
        f"layer {source}" for source in (1, 2, 1)
    ]
    if seed is None and rows == 1:
        assert result.summary.eq11_ratio == 1
        assert [layer.query for layer in result.layers] == [11, 11, 1, 1, 1, 1]


# --- the full policy, monotone


def test_the_full_policy_with_all_rows_executes_what_the_original_does() -> None:
    cost = explain(compiled_with("llava", Policy.full(LAYERS)), rows=0).summary
    assert cost.executed_ratio == cost.eq11_ratio == cost.kv_ratio == 1


def test_the_last_layer_updates_only_the_requested_rows() -> None:
    result = explain(compiled_with("llava", Policy.full(LAYERS)), system=3, visual=4, text=5)
    assert [(c.query, c.key_value, c.mlp) for c in result.layers] == [(12, 12, 12)] * 3 + [(1, 12, 1)]
    assert result.layers[-1].note == "updates requested rows only"
    assert result.summary.eq11_ratio == 1


@examples(10)
@given(
    depths=st.tuples(*[st.integers(0, LAYERS)] * 3),
    visual_tokens=st.integers(0, 8),
    raised=st.sampled_from([*range(4), "rows", "text"]),
)
def test_more_of_anything_never_executes_less(
    depths: tuple[int, int, int], visual_tokens: int, raised: int | str
) -> None:
    def cost(values: list[int], rows: int = 1, text: int = 4) -> int:
        names = ("mha_query_depth", "mha_key_value_depth", "mlp_depth", "visual_tokens")
        policy = Policy.depthwise(LAYERS, **dict(zip(names, values, strict=True)))
        return executed_flops(compiled_with("llama", policy), system=3, visual=9, text=text, rows=rows)

    values = [*depths, visual_tokens]
    if isinstance(raised, str):
        more = cost(values, rows=2) if raised == "rows" else cost(values, text=5)
    else:
        limit = 9 if raised == 3 else LAYERS
        more = cost([min(v + 1, limit) if i == raised else v for i, v in enumerate(values)])
    assert more >= cost(values)


# --- tokens per layer and notes


def test_frozen_visual_tokens_only_supply_keys_and_values() -> None:
    result = explain(compiled_with("llava", Policy.depthwise(LAYERS, **SPLIT)), system=3, visual=9, text=4)
    assert [(c.query, c.key_value, c.mlp) for c in result.layers] == [(16, 16, 16), (7, 16, 7), (7, 16, 7), (1, 7, 1)]
    frozen = "visual frozen: only keys and values"
    assert [c.note for c in result.layers] == ["", frozen, frozen, "visual absent; updates requested rows only"]


def test_visual_updates_that_nobody_reads_are_not_executed() -> None:
    policy = Policy.depthwise(LAYERS, mha_depth=2, mlp_depth=LAYERS)
    result = explain(compiled_with("llava", policy), system=3, visual=9, text=4)
    # The keys of layer 1 are the last that text reads: the update of layer 1 itself is dead already
    assert [(c.query, c.mlp) for c in result.layers] == [(16, 16), (7, 7), (7, 7), (1, 1)]


def test_each_part_of_a_split_group_has_its_own_note() -> None:
    pruned = [("visual_rest", layer, m) for layer in (1, 2, 3) for m in ("mha", "mlp")]
    pruned += [("visual_salient", layer, m) for layer in (2, 3) for m in ("mha_query", "mlp")]
    policy = Policy.from_operations(LAYERS, pruned, salient_fraction=0.25)
    result = explain(compiled_with("llava", policy), system=2, visual=8, text=3)
    assert [c.key_value for c in result.layers] == [13, 7, 7, 7]
    assert result.layers[2].note == "visual_salient frozen: only keys and values; visual_rest absent"


def test_a_fused_projection_is_named_and_paid_for_on_both_sides() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = hf.Phi3Config(**sizes, vocab_size=16, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = hf.Phi3ForCausalLM._from_config(config, attn_implementation="eager").eval()
    compiled = dop_compile(model, Policy.depthwise(3, mha_query_depth=1, mlp_depth=1), backend="eager")
    groups = prompt(2, 5, 4)["token_groups"]
    call = functools.partial(compiled, torch.ones_like(groups), token_groups=groups, logits_to_keep=1)
    with torch.no_grad():
        call()
        with FlopCounterMode(display=False) as counter:
            call()
    result = explain(compiled, system=2, visual=5, text=4)
    assert result.summary.executed_flops == counter.get_total_flops() - 2 * 32 * 16
    assert "fused projection: sliced after it" in result.layers[1].note


def test_keys_that_nobody_reads_or_stores_are_not_counted() -> None:
    policy = Policy.from_operations(LAYERS, [(group, 1, "mha_query") for group in ("system", "visual", "text")])
    compiled = dop_compile(model_of("llama"), policy, backend="eager", disable_passes=["remove_dead"])
    counted, _ = run(compiled, (2, 3, 4), 0, use_cache=False)
    result = explain(compiled, system=2, visual=3, text=4, rows=0, use_cache=False)
    assert (result.layers[1].key_value, result.summary.executed_flops) == (0, counted)


def test_a_prompt_without_visual_tokens_is_all_text() -> None:
    compiled = compiled_with("llava", Policy.depthwise(LAYERS, mha_depth=0, mlp_depth=0, system_mlp_depth=0))
    result = explain(compiled, system=3, visual=0, text=4, rows=0)
    assert [(c.query, c.key_value, c.mlp) for c in result.layers] == [(7, 7, 7)] * LAYERS


@pytest.mark.parametrize("family", [name for name, f in FAMILIES.items() if not f.is_text_only])
def test_every_family_is_explained(family: str) -> None:
    layers = FAMILIES[family].num_layers
    result = explain(compiled_with(family, Policy.depthwise(layers, **SPLIT, visual_tokens=5)), visual=576)
    assert (result.entering, len(result.layers)) == (5, layers)
    assert result.summary.executed_ratio is not None
    assert result.summary.executed_ratio < 0.5


def test_sizes_that_cannot_be_read_leave_the_tokens_and_say_why() -> None:
    model = FAMILIES["llama"].build()
    compiled = dop_compile(model, Policy.depthwise(LAYERS, **SPLIT), backend="eager")
    compiled.config.kv_lora_rank = 2
    result = explain(compiled, system=3, visual=9, text=4)
    assert [c.key_value for c in result.layers] == [16, 16, 16, 7]
    assert result.layers[0].flops is None
    assert result.summary.executed_ratio is None
    assert "kv_lora_rank" in result.missing
    assert "kv_lora_rank" in str(result)


# --- tiers, output, errors


def test_every_tier_is_summed_up_and_a_view_explains_its_own() -> None:
    small = Policy.depthwise(LAYERS, **SPLIT, visual_tokens=4)
    compiled = compiled_with("llava", {"100%": Policy.full(LAYERS), "small": small})
    result = explain(compiled, visual=7)
    assert (result.tier, [cost.tier for cost in result.tiers]) == ("100%", ["100%", "small"])
    assert explain(compiled, "small").entering == explain(compiled.tier("small")).entering == 4
    assert explain(compiled, "small", visual=7).tiers == result.tiers
    assert executed_flops(compiled.tier("small"), visual=7) == result.tiers[1].executed_flops
    assert result.tiers[1].eq11_flops == prefill_flops(model_of("llava").config, small, visual=7)


def test_the_table_shows_equal_layers_in_one_row() -> None:
    text = str(explain(compiled_with("llava", Policy.depthwise(LAYERS, **SPLIT)), system=3, visual=9, text=4))
    lines = text.splitlines()
    assert lines[0].endswith("3 system + 9 visual + 4 text tokens, logits of the last 1")
    assert [line.split()[0] for line in lines[4:7]] == ["0", "1-2", "3"]
    assert "visual frozen" in lines[5]
    assert lines[-1].startswith("original")


def test_to_dict_is_plain_json() -> None:
    result = explain(compiled_with("llava", Policy.depthwise(LAYERS, **SPLIT)))
    data = json.loads(json.dumps(result.to_dict()))
    assert data["layers"][1]["note"] == result.layers[1].note
    assert data["tiers"][0]["executed_ratio"] == result.summary.executed_ratio


def test_a_model_on_the_meta_device_is_explained() -> None:
    with torch.device("meta"):
        model = FAMILIES["llama"].model_class(FAMILIES["llama"].config())
    policy = Policy.depthwise(LAYERS, **SPLIT)
    expected = explain(compiled_with("llama", policy), visual=9).summary
    assert explain(dop_compile(model.eval(), policy, backend="eager"), visual=9).summary == expected


def test_wrong_questions_are_refused() -> None:
    compiled = compiled_with("llava", Policy.depthwise(LAYERS, visual_tokens=4))
    with pytest.raises(TypeError, match="a model returned by dop_compile"):
        explain(model_of("llava"))
    with pytest.raises(ValueError, match="tier 'fast' does not exist"):
        explain(compiled, "fast")
    with pytest.raises(ValueError, match="visual: expected an integer >= 0"):
        explain(compiled, visual=-1)
    with pytest.raises(ValueError, match="reach into the visual tokens"):
        explain(compiled, visual=9, text=3, rows=5)
    with pytest.raises(ValueError, match="at least one token"):
        explain(compiled, system=0, visual=0, text=0)


def test_units_have_three_digits() -> None:
    assert [show_flops(n) for n in (0, 999, 1000, 12_345, 123_456_000, 2e12)] == [
        "0 FLOPs",
        "999 FLOPs",
        "1 kFLOPs",
        "12.3 kFLOPs",
        "123 MFLOPs",
        "2 TFLOPs",
    ]
    assert [show_bytes(n) for n in (0, 1023, 1024, 1024**2 * 3 / 2, 2**50)] == [
        "0 B",
        "1023 B",
        "1 KiB",
        "1.5 MiB",
        "1024 TiB",
    ]
    assert show_flops(None) == "-"
