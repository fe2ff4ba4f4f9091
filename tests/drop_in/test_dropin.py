"""The compiled model is the original's class and weights; the original stays as it was; tiers; what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    StaticCache,
)

from dop_compile import Policy, dop_compile
from dop_compile.errors import UnsupportedUsageError
from tests.families import FAMILIES
from tests.support import assert_close, compile_eagerly, make_batch, reference

PRUNED = Policy.depthwise(4, mha_query_depth=1, mha_key_value_depth=3, mlp_depth=2)
TIERS = {"100%": Policy.full(4), "pruned": PRUNED}
NAMES = ("llava", "qwen2_5_vl", "llama")


def everything(model: nn.Module) -> Any:
    """What a forgotten change of a module would show in."""
    return [
        (name, {k: id(v) for k, v in vars(module).items()}, *(list(vars(module)[kind]) for kind in HOOKS))
        for name, module in model.named_modules()
    ]


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_modules", "_parameters", "_buffers")


@pytest.mark.parametrize("name", NAMES)
def test_same_class_same_weights_and_an_untouched_original(name: str) -> None:
    batch = make_batch(name, model=FAMILIES[name].build())
    model = batch.model
    with torch.no_grad():
        output = model(**batch.inputs).logits
    before = everything(model)
    compiled = compile_eagerly(model, PRUNED)
    compiled.generate(**batch.inputs, **batch.call_arguments(), max_new_tokens=3)
    assert everything(model) == before
    with torch.no_grad():
        assert torch.equal(model(**batch.inputs).logits, output)

    assert type(compiled) is type(model)
    assert compiled.config is model.config
    shared = dict(compiled.named_parameters())
    assert list(shared) == [key for key, _ in model.named_parameters()]
    for key, parameter in model.named_parameters():
        assert shared[key].data_ptr() == parameter.data_ptr()
    assert {id(b) for b in compiled.buffers()} == {id(b) for b in model.buffers()}


@torch.no_grad()
def test_tiers() -> None:
    batch = make_batch("llava")
    compiled = compile_eagerly(batch.model, TIERS)
    fast = compiled.tier("pruned")
    assert type(fast) is type(batch.model)
    full, pruned = batch.model(**batch.inputs).logits, reference(batch, PRUNED)
    assert torch.equal(compiled(**batch.inputs).logits, full)
    for logits in (compiled(**batch.inputs, tier="pruned").logits, fast(**batch.inputs).logits):
        assert_close(logits[batch.mask], pruned[batch.mask])
    assert torch.equal(fast(**batch.inputs, tier="100%").logits, full)
    assert torch.equal(fast.tier("100%")(**batch.inputs).logits, full)
    assert fast.lm_head.weight is batch.model.lm_head.weight
    assert fast.dop is compiled.dop


@torch.no_grad()
def test_a_conversation_stays_in_its_tier() -> None:
    batch = make_batch("llava")
    compiled = compile_eagerly(batch.model, TIERS | {"same": PRUNED})
    cache = compiled(**batch.inputs, tier="pruned").past_key_values
    token = batch.inputs["input_ids"][:, -1:]
    mask = torch.nn.functional.pad(batch.inputs["attention_mask"], (0, 1), value=1)
    with pytest.raises(UnsupportedUsageError, match=r"begun under tier 'pruned'.*'100%'"):
        compiled(input_ids=token, attention_mask=mask, past_key_values=cache)
    compiled(input_ids=token, attention_mask=mask, past_key_values=cache, tier="same")


@torch.no_grad()
def test_decoder_arguments_passed_by_position() -> None:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48
    )
    model = GPTNeoXForCausalLM(config).eval()
    ids = torch.arange(9)[None]
    groups = torch.tensor([[2, 1, 1, 1, 1, 0, 0, 0, 0]])
    compiled = dop_compile(model, TIERS, backend="eager", token_groups=groups)
    assert torch.equal(compiled(ids).logits, model(ids).logits)
    assert not torch.equal(compiled(ids, tier="pruned").logits, model(ids).logits)


# What is refused.


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
@pytest.mark.parametrize("through_config", [False, True])
def test_outputs_that_pruned_operations_do_not_have(name: str, through_config: bool) -> None:
    batch = make_batch("llava", model=FAMILIES["llava"].build(attn="eager"))
    compiled = compile_eagerly(batch.model, PRUNED)
    arguments = {} if through_config else {name: True}
    if through_config:
        setattr(batch.model.get_decoder().config, name, True)
    with pytest.raises(UnsupportedUsageError, match=f"{name}=True.*original model"):
        compiled(**batch.inputs, **arguments)
    arguments |= {"return_dict_in_generate": True} if arguments else {}
    with pytest.raises(UnsupportedUsageError, match=f"{name}=True"):
        compiled.generate(**batch.inputs, **arguments, max_new_tokens=2)


def test_router_logits() -> None:
    config = MixtralConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        num_local_experts=4,
    )
    compiled = dop_compile(MixtralForCausalLM(config).eval(), Policy.full(2), backend="eager")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        compiled(ids)
    with pytest.raises(UnsupportedUsageError, match="output_router_logits=True"):
        compiled(ids, output_router_logits=True)


@pytest.mark.usefixtures("no_streams")
@pytest.mark.parametrize("implementation", ["static", "quantized", "offloaded"])
def test_other_caches(implementation: str) -> None:
    batch = make_batch("llava")
    compiled = compile_eagerly(batch.model, PRUNED)
    expected = "StaticCache" if implementation == "static" else "cache"
    with pytest.raises((UnsupportedUsageError, ImportError), match=expected):
        compiled.generate(**batch.inputs, max_new_tokens=2, cache_implementation=implementation)


@pytest.mark.usefixtures("no_streams")
def test_caches_passed_by_the_caller() -> None:
    batch = make_batch("llava")
    compiled = compile_eagerly(batch.model, PRUNED)
    config = batch.model.config.get_text_config()
    with pytest.raises(UnsupportedUsageError, match=r"StaticCache.*DynamicCache only"):
        compiled(**batch.inputs, past_key_values=StaticCache(config=config, max_cache_len=64))
    with pytest.raises(UnsupportedUsageError, match="offloaded"):
        compiled(**batch.inputs, past_key_values=DynamicCache(config=config, offloading=True))
    filled = batch.model(**batch.inputs).past_key_values
    with pytest.raises(UnsupportedUsageError, match="filled by another model"):
        compiled(**batch.inputs, past_key_values=filled)
    compiled(**batch.inputs, past_key_values=DynamicCache(config=config))


@pytest.mark.parametrize("policy", [PRUNED, Policy.full(4), Policy.full(4).replace(visual_tokens=2)], ids=repr)
def test_a_pruned_cache_is_no_cache_for_the_original(policy: Policy) -> None:
    """Without the error it would be a wrong answer: what is missing cannot be told from outside."""
    batch = make_batch("llava")
    cache = compile_eagerly(batch.model, policy)(**batch.inputs).past_key_values
    token = batch.inputs["input_ids"][:, -1:]
    with pytest.raises(UnsupportedUsageError, match="conversation with tier 'default' of a compiled model"):
        batch.model(input_ids=token, past_key_values=cache)
    state = cache.layers[0].keys
    with pytest.raises(UnsupportedUsageError, match="another model"):
        cache.update(state, state, 0)


def test_a_refused_call_leaves_the_cache_to_the_caller() -> None:
    batch = make_batch("llava")
    cache = DynamicCache(config=batch.model.config.get_text_config())
    with pytest.raises(UnsupportedUsageError, match="output_attentions"):
        compile_eagerly(batch.model, PRUNED)(**batch.inputs, past_key_values=cache, output_attentions=True)
    wrong = torch.arange(3)[None]
    with pytest.raises(ValueError, match="position_ids"):
        compile_eagerly(batch.model, PRUNED)(**batch.inputs, past_key_values=cache, position_ids=wrong)
    assert type(cache) is DynamicCache
    expected = batch.model(**batch.inputs).logits
    assert torch.equal(batch.model(**batch.inputs, past_key_values=cache).logits, expected)


def test_generation_config_is_followed() -> None:
    batch = make_batch("llava")
    compiled = compile_eagerly(batch.model, Policy.full(4))
    settings = GenerationConfig(max_new_tokens=5, do_sample=False, repetition_penalty=1.3, pad_token_id=0)
    expected = batch.model.generate(**batch.inputs, generation_config=settings)
    assert torch.equal(compiled.generate(**batch.inputs, generation_config=settings), expected)
    compiled.generation_config.max_new_tokens = 3
    assert batch.model.generation_config.max_new_tokens != 3
    assert compiled.generate(**batch.inputs).shape[1] == batch.inputs["input_ids"].shape[1] + 3
