"""Arguments that transformers, or a model with code of its own, spells in other ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from dop_compile import Policy, dop_compile
from dop_compile.errors import UnsupportedModelError
from dop_compile.hf.spellings import CACHE, cache_of, canonical, parameters, require, spelled
from dop_compile.replay import Replay
from tests.support import assert_close

LAYERS = 3
CONFIG = LlamaConfig(
    vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4
)
PRUNED = Policy.depthwise(LAYERS, mha_query_depth=1, mha_key_value_depth=2, mlp_depth=1)
LAYER_CACHE = spelled(LlamaDecoderLayer.forward, {CACHE: ()}).popitem()[0]
MASK_CACHE = spelled(create_causal_mask, {CACHE: ()}).popitem()[0]
IDS = torch.tensor([[3, 50, 51, 52, 53, 54, 7, 8]])
GROUPS = torch.tensor([[2, 1, 1, 1, 1, 1, 0, 0]])


class OwnDecoder(LlamaModel):
    """A decoder with a spelling that no release of transformers that is supported gives it."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        layer_past: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> BaseModelOutputWithPast:
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and layer_past is None:
            layer_past = DynamicCache(config=self.config)
        if position_ids is None:
            past = layer_past.get_seq_length() if layer_past is not None else 0
            position_ids = (torch.arange(hidden.shape[1]) + past)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{MASK_CACHE: layer_past},
        )
        rotary = self.rotary_emb(hidden, position_ids=position_ids)
        for layer in self.layers:
            cache = {LAYER_CACHE: layer_past}
            hidden = layer(hidden, attention_mask=mask, position_ids=position_ids, position_embeddings=rotary, **cache)
        return BaseModelOutputWithPast(self.norm(hidden), layer_past)


class OwnModel(LlamaForCausalLM):
    """Takes what `generate` passes, and calls its decoder by the spelling of that."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.model = OwnDecoder(config)

    def forward(self, *args: Any, use_cache: bool | None = None, **kwargs: Any) -> CausalLMOutputWithPast:
        named = canonical(LlamaForCausalLM.forward, dict(zip(("input_ids",), args, strict=False)) | kwargs)
        cache = named.pop(CACHE, None)
        rows = named.pop("logits_to_keep", 0)
        named = {name: value for name, value in named.items() if name in parameters(OwnDecoder.forward)}
        out = self.model(**named, layer_past=cache, use_cache=use_cache)
        return CausalLMOutputWithPast(None, self.lm_head(out.last_hidden_state[:, -rows:]), cache_of(out))


@pytest.fixture(scope="module")
def pair() -> tuple[LlamaForCausalLM, OwnModel]:
    """One model under transformers' spelling and under its own."""
    plain, own = LlamaForCausalLM(CONFIG).eval(), OwnModel(CONFIG).eval()
    own.load_state_dict(plain.state_dict())
    return plain, own


@torch.no_grad()
@pytest.mark.parametrize("policy", [Policy.full(LAYERS), PRUNED], ids=["full", "pruned"])
def test_a_decoder_of_another_spelling_is_traced_and_keeps_its_cache(pair: Any, policy: Policy) -> None:
    plain, own = (dop_compile(model, policy, backend="eager") for model in pair)
    given = {"input_ids": IDS, "token_groups": GROUPS}
    first, expected = own(**given), plain(**given)
    assert_close(first.logits, expected.logits)
    assert cache_of(first).get_seq_length() == IDS.shape[1]
    step = own(torch.tensor([[9]]), **{CACHE: cache_of(first)})
    assert_close(step.logits, plain(torch.tensor([[9]]), **{CACHE: cache_of(expected)}).logits)
    settings = {**given, "max_new_tokens": 6, "do_sample": False}
    assert own.generate(**settings).tolist() == plain.generate(**settings).tolist()


@torch.no_grad()
def test_a_decoder_of_another_spelling_is_replayed(pair: Any) -> None:
    plain, own = (
        Replay(dop_compile(model, PRUNED, backend="eager"), {"input_ids": IDS, "token_groups": GROUPS}, depths=(1,))
        for model in pair
    )
    assert_close(own.original, plain.original)
    assert_close(own.logits(PRUNED), plain.logits(PRUNED))


@torch.no_grad()
@pytest.mark.parametrize("spelling", ["cache", "past_key_values"])
def test_callers_may_use_either_spelling(pair: Any, spelling: str) -> None:
    compiled = dop_compile(pair[0], PRUNED, backend="eager")
    given = DynamicCache(config=CONFIG)
    first = compiled(IDS, token_groups=GROUPS, **{spelling: given})
    assert cache_of(first) is given
    assert given.get_seq_length() == IDS.shape[1]
    step = compiled(torch.tensor([[9]]), **{spelling: given})
    again = compiled(torch.cat([IDS, torch.tensor([[9]])], 1), token_groups=torch.cat([GROUPS, GROUPS[:, -1:]], 1))
    assert_close(step.logits[:, -1], again.logits[:, -1])
    whole = torch.cat([IDS, torch.tensor([[9, 4]])], 1)
    settings = {"max_new_tokens": 3, "do_sample": False, "token_groups": torch.nn.functional.pad(GROUPS, (0, 2))}
    assert (
        compiled.generate(whole, **settings, **{spelling: given}).tolist()
        == compiled.generate(whole, **settings).tolist()
    )


def test_two_spellings_with_different_values_are_refused(pair: Any) -> None:
    compiled = dop_compile(pair[0], PRUNED, backend="eager")
    with pytest.raises(ValueError, match="cache and past_key_values are two names of one argument"):
        compiled(IDS, cache=DynamicCache(config=CONFIG), past_key_values=DynamicCache(config=CONFIG))


def test_a_decoder_that_takes_no_known_cache_is_named() -> None:
    class Memory(LlamaModel):
        def forward(self, inputs_embeds: Any, attention_mask: Any, position_ids: Any, memory: Any) -> Any: ...  # type: ignore[override]

    model = LlamaForCausalLM(CONFIG)
    model.model = Memory(CONFIG)
    with pytest.raises(UnsupportedModelError, match=r"takes self, .*, memory; expected past_key_values or cache"):
        dop_compile(model, PRUNED, backend="eager")


# --- signatures


def old(hidden: Any, attention_mask: Any = None, past_key_values: Any = None) -> None: ...
def new(hidden: Any, attention_mask: Any = None, cache: Any = None, **kwargs: Any) -> None: ...
def both(past_key_values: Any = None, cache: Any = None) -> None: ...
def anything(**kwargs: Any) -> None: ...


def test_arguments_are_renamed_for_who_takes_them() -> None:
    for function, spelling in ((old, "past_key_values"), (new, "cache")):
        for given in ("past_key_values", "cache", "layer_past"):
            assert spelled(function, {"attention_mask": 1, given: 2}) == {"attention_mask": 1, spelling: 2}
            assert canonical(function, {given: 2, "other": 3}) == {CACHE: 2, "other": 3}


def test_a_value_goes_before_a_default() -> None:
    assert canonical(new, {"cache": None, "past_key_values": 2}) == {CACHE: 2}
    assert canonical(new, {"past_key_values": 2, "cache": None}) == {CACHE: 2}
    assert canonical(new, {"cache": None}) == {CACHE: None}


def test_a_further_parameter_is_another_argument() -> None:
    assert spelled(both, {"past_key_values": 1, "cache": 2}) == {"past_key_values": 1, "cache": 2}


def test_names_that_a_function_does_not_have_are_left() -> None:
    assert spelled(anything, {"cache": 1, "input_ids": 2}) == {CACHE: 1, "input_ids": 2}
    assert spelled(old, {"input_ids": 2}) == {"input_ids": 2}


def test_what_is_required_is_looked_for() -> None:
    require(old, CACHE, "attention_mask")
    require(anything, CACHE, "inputs_embeds")
    with pytest.raises(UnsupportedModelError, match=r"old takes hidden, .*; expected inputs_embeds or input_embeds"):
        require(old, CACHE, "inputs_embeds")


def test_the_cache_of_an_output() -> None:
    assert cache_of(BaseModelOutputWithPast(torch.ones(1), 5)) == 5  # type: ignore[arg-type]
    assert cache_of(BaseModelOutputWithPast(torch.ones(1))) is None
    assert cache_of((1, 2)) is None
