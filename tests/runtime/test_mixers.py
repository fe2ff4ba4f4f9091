"""Recurrent and convolutional layers: what their state is made of, and what happens to it between calls."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from dop_compile import Policy, UnsupportedModelError
from dop_compile.errors import UnsupportedUsageError
from dop_compile.hf.mixers import is_mixer, mixes_no_tokens, with_padding_mask
from dop_compile.policy.ranking import Ranking, Stage
from tests.conformance.hybrid import HYBRID
from tests.conversation import Conversation, assert_original_over_two_turns, conversation_batch
from tests.families import Family
from tests.reference import layer_parts, named_child, on_sequence, reference_generate, text_decoder
from tests.support import Rows, assert_close, assert_forward_matches, compile_eagerly, make_batch, reference

SPLIT = {"mha_query_depth": 1, "mha_key_value_depth": 3, "mlp_depth": 2}
DELTA, CONVOLUTION, STATE_SPACE, BESIDE = (HYBRID[n] for n in ("qwen3_5", "lfm2_vl", "bamba", "falcon_h1"))
ONE_ROW: Rows = [[("text", 4), ("image",), ("text", 3)]]
TWO_ROWS: Rows = [*ONE_ROW, [("text", 2), ("image", 1), ("text", 2)]]


def split_policy(**more: Any) -> Policy:
    return Policy.depthwise(4, **SPLIT, **more)


def first_mixer(model: nn.Module) -> Any:
    layers = named_child(text_decoder(model), ("layers",))
    return next(part for layer in layers for part in layer_parts(layer)["mixer"])


# --- the reference itself: recurrences written by hand, token by token


def delta_rule_by_hand(mixer: Any, x: Tensor, members: Tensor) -> Tensor:
    """Gated delta rule (Gated Delta Networks, eq. 10), in whose sequence are the members alone; (tokens, hidden)."""
    heads, groups = mixer.num_v_heads, mixer.num_v_heads // mixer.num_k_heads
    state = x.new_zeros(heads, mixer.head_k_dim, mixer.head_v_dim)
    window: list[Tensor] = []
    out = torch.zeros_like(x)
    for place in members.nonzero()[:, 0]:
        token = x[place]
        window = [*window, mixer.in_proj_qkv(token)][-mixer.conv_kernel_size :]
        taps = mixer.conv1d.weight[:, 0, -len(window) :]
        mixed = nn.functional.silu(sum(taps[:, n] * seen for n, seen in enumerate(window)))
        query, key, value = mixed.split([mixer.key_dim, mixer.key_dim, mixer.value_dim])
        query, key = (t.view(mixer.num_k_heads, -1).repeat_interleave(groups, 0) for t in (query, key))
        query, key = (t * (t.pow(2).sum(-1, keepdim=True) + 1e-6).rsqrt() for t in (query, key))
        decay = (-mixer.A_log.exp() * nn.functional.softplus(mixer.in_proj_a(token) + mixer.dt_bias)).exp()
        rate = mixer.in_proj_b(token).sigmoid()
        state = state * decay[:, None, None]
        seen = (state * key[..., None]).sum(1)
        change = rate[:, None] * (value.view(heads, -1) - seen)
        state = state + key[..., None] * change[:, None]
        read = (state * query[..., None]).sum(1) * mixer.head_k_dim**-0.5
        gated = mixer.norm(read, mixer.in_proj_z(token).view(heads, -1))
        out[place] = mixer.out_proj(gated.flatten())
    return out


def convolution_by_hand(mixer: Any, x: Tensor, members: Tensor) -> Tensor:
    window: list[Tensor] = []
    out = torch.zeros_like(x)
    for place in members.nonzero()[:, 0]:
        gate, scale, value = mixer.in_proj(x[place]).chunk(3)
        window = [*window, gate * value][-mixer.conv.kernel_size[0] :]
        taps = mixer.conv.weight[:, 0, -len(window) :]
        out[place] = mixer.out_proj(scale * sum(taps[:, n] * seen for n, seen in enumerate(window)))
    return out


@pytest.mark.parametrize(("family", "by_hand"), [(DELTA, delta_rule_by_hand), (CONVOLUTION, convolution_by_hand)])
@torch.no_grad()
def test_the_reference_is_the_recurrence_over_members(family: Family, by_hand: Any) -> None:
    mixer = first_mixer(family.build(dtype=torch.float64))
    x = torch.randn(1, 11, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    members = torch.tensor([1, 0, 0, 1, 1, 0, 1, 1, 0, 0, 1], dtype=torch.bool)
    expected = by_hand(mixer, x[0], members)
    found = on_sequence(mixer.forward, members)(hidden_states=x)[0]
    assert_close(found, expected, 1e-6 if family is DELTA else 1e-12)  # the delta rule is computed in float32
    masked = mixer(hidden_states=x, attention_mask=members[None].long())[0]
    assert (masked[members] - expected[members]).abs().max() > 1e-2  # a padding mask is another thing


# --- what they are


def test_mixers_are_told_by_what_they_do_with_the_cache() -> None:
    mixers = {name: {type(m).__name__ for m in family.build().modules() if is_mixer(m)} for name, family in
              (("qwen3_5", DELTA), ("lfm2_vl", CONVOLUTION), ("nemotron_h", HYBRID["nemotron_h"]))}  # fmt: skip
    assert mixers == {
        "qwen3_5": {"Qwen3_5GatedDeltaNet"},
        "lfm2_vl": {"Lfm2ShortConv"},
        "nemotron_h": {"NemotronHMamba2Mixer"},
    }
    layers = named_child(text_decoder(HYBRID["nemotron_h"].build()), ("layers",))
    assert [mixes_no_tokens(layer) for layer in layers] == [False, True, False, True]


def test_a_padding_mask_replaces_the_given_one_wherever_it_stands() -> None:
    mixer = first_mixer(DELTA.build())
    assert with_padding_mask(mixer, ("x",), {"attention_mask": "old", "other": 1}, "new") == (
        ("x",),
        {"attention_mask": "new", "other": 1},
    )
    assert with_padding_mask(mixer, ("x", "cache", "old"), {}, "new") == (("x", "cache", "new"), {})


def test_a_mixer_beside_the_attention_is_a_block_of_its_own() -> None:
    batch = make_batch(BESIDE)
    compiled = compile_eagerly(batch.model, split_policy())
    assert_forward_matches(compiled, batch, split_policy(), None)
    blocks = [block for block in compiled.dop.programs[-1].blocks if block.layer == 1 and block.kind == "mha"]
    assert sorted(block.mixes for block in blocks) == [False, True]
    assert len({block.name for block in blocks}) == 2


def test_a_query_that_is_no_key_has_nothing_to_read_in_a_mixer() -> None:
    """The attention beside it reads the text."""
    batch = make_batch(BESIDE)
    policy = Policy.depthwise(4, mha_query_depth=3, mha_key_value_depth=1, mlp_depth=2)
    assert_forward_matches(compile_eagerly(batch.model, policy), batch, policy, None)


def test_hooks_and_replaced_forwards_of_mixers_are_honoured() -> None:
    batch = conversation_batch(CONVOLUTION, None)
    compiled = compile_eagerly(batch.model, split_policy())
    before = compiled(**batch.inputs).logits
    mixer, calls = first_mixer(batch.model), []
    handle = mixer.register_forward_hook(lambda module, args, output: calls.append(1) or output * 2)
    assert not torch.equal(compiled(**batch.inputs).logits, before)
    assert calls
    handle.remove()
    assert torch.equal(compiled(**batch.inputs).logits, before)


def test_a_ranking_needs_an_attention_in_its_layer() -> None:
    policy = Policy(4, ranking=Ranking("last_token", (Stage(0, tokens=2),)))
    with pytest.raises(UnsupportedModelError, match=r"layer 0 has no attention .* layers \[1, 3\] have one"):
        compile_eagerly(DELTA.build(), policy)


def test_packed_rows_are_refused_where_states_go_on_over_borders() -> None:
    family = HYBRID["qwen3_next"]
    model = family.build()
    ids = torch.arange(20, 32)[None]
    packed = {"input_ids": ids, "position_ids": torch.cat([torch.arange(5), torch.arange(7)])[None]}
    compiled = compile_eagerly(model, {"full": Policy.full(4), "split": split_policy()})
    groups = (torch.arange(12) % 3 == 0).long()[None]
    with pytest.raises(UnsupportedUsageError, match="run into each other in the recurrent"):
        compiled(**packed, token_groups=groups, use_cache=False, tier="split")
    full = compiled(**packed, token_groups=groups, use_cache=False, tier="full").logits
    assert torch.equal(full, model(**packed, use_cache=False).logits)


@torch.no_grad()
def test_padding_that_a_bias_makes_something_of_is_refused() -> None:
    """Transformers' own padded rows differ from the rows alone there."""

    def config() -> Any:
        made = STATE_SPACE.config()
        made.mamba_proj_bias = True
        return made

    family = replace(STATE_SPACE, config=config)
    batch = make_batch(family, model=family.build())
    arguments = batch.inputs | batch.call_arguments()
    compiled = compile_eagerly(batch.model, {"full": Policy.full(4), "joint": Policy.depthwise(4, mha_depth=1)})
    own = batch.model(**batch.inputs).logits
    assert torch.equal(compiled(**arguments, tier="full").logits, own)
    alone = batch.model(input_ids=batch.inputs["input_ids"][:1, batch.mask[0]]).logits[0]
    assert (own[0, batch.mask[0]] - alone).abs().max() > 1e-2
    with pytest.raises(UnsupportedUsageError, match="project with a bias"):
        compiled(**arguments, tier="joint")
    expected = reference(batch, Policy.depthwise(4, mha_depth=1))
    for row, mask in enumerate(batch.mask):
        one = {name: value[row : row + 1, mask] for name, value in arguments.items()}
        assert_close(compiled(**one, tier="joint").logits[0], expected[row, mask])


# --- the cache


@pytest.mark.parametrize("own_cache", [False, True])
@pytest.mark.parametrize("family", [DELTA, CONVOLUTION], ids=lambda f: f.name)
def test_turns_of_a_conversation(family: Family, own_cache: bool) -> None:
    """A picture, a turn with another where the class numbers positions then, one of a word: all as one prompt."""
    batch = conversation_batch(family, ONE_ROW)
    policy = split_policy(visual_tokens=4, reducer="given")
    cache = DynamicCache(config=batch.model.config.get_text_config()) if own_cache else None
    talk = Conversation(compile_eagerly(batch.model, policy), batch, cache)

    def expected() -> list[list[int]]:
        asked = talk.asked
        return reference_generate(batch.model, asked.inputs, policy, 3, talk.kept, towers=asked.towers)

    assert talk.ask([[0, 3, 4, 8]]) == expected()
    assert cache is None or talk.cache is cache
    if not family.has_mrope:
        talk.say([[("text", 2), ("image",), ("text", 2)]])
        assert talk.ask([[1, 2, 5, 6]]) == expected()
    for length in (3, 1):
        talk.say([[("text", length)]])
        assert talk.ask() == expected()


@pytest.mark.parametrize("family", [DELTA, CONVOLUTION], ids=lambda f: f.name)
def test_the_original_over_two_turns(family: Family) -> None:
    assert_original_over_two_turns(conversation_batch(family, ONE_ROW))


@torch.no_grad()
def test_a_later_turn_whose_rows_keep_different_numbers_is_refused_and_the_cache_left() -> None:
    batch = conversation_batch(CONVOLUTION, TWO_ROWS)
    compiled = compile_eagerly(batch.model, Policy.depthwise(4, mha_depth=1))
    # A second picture in the first row alone; both rows are as long, so that nothing of the caller's is padding
    width = batch.family.item_sizes(batch.model, [[("image",)]])[0][0]
    later = make_batch(batch.family, [[("image",), ("text", 2)], [("text", width + 4)]], model=batch.model)
    assert later.mask.all()
    cache = compiled(**batch.inputs).past_key_values
    states = copy.deepcopy(cache.layers[0].conv_states[0])
    mask = torch.cat([batch.inputs["attention_mask"], later.inputs["attention_mask"]], 1)
    with pytest.raises(UnsupportedUsageError, match="keep different numbers of tokens in a later turn"):
        compiled(**(later.inputs | {"attention_mask": mask}), past_key_values=cache)
    assert torch.equal(cache.layers[0].conv_states[0], states)
    assert cache.columns_seen == batch.mask.shape[1]
    alone = {name: value[:1] for name, value in later.inputs.items()}
    first = {name: value[:1] for name, value in batch.inputs.items()}
    cache = compiled(**first).past_key_values
    compiled(**(alone | {"attention_mask": mask[:1]}), past_key_values=cache)


@pytest.mark.parametrize("family", [CONVOLUTION, STATE_SPACE], ids=lambda f: f.name)
@torch.no_grad()
def test_beams_and_rows_of_the_cache_take_their_states_along(family: Family) -> None:
    batch = conversation_batch(family, None if family.is_text_only else TWO_ROWS)
    policies = {"full": Policy.full(4), "split": split_policy()}
    compiled = compile_eagerly(batch.model, policies)
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3}
    arguments = batch.inputs | batch.call_arguments()
    found = compiled.generate(**arguments, tier="full", **settings)
    assert torch.equal(found, batch.model.generate(**batch.inputs, **settings))
    # Rows taken from a cache go on as the same rows of another do
    output = compiled(**arguments, tier="split")
    token = output.logits[:, -1:].argmax(-1)
    mask = torch.nn.functional.pad(batch.inputs["attention_mask"], (0, 1), value=1)
    rows = torch.tensor([len(token) - 1, 0])
    other = copy.deepcopy(output.past_key_values)
    expected = compiled(
        input_ids=token, attention_mask=mask, past_key_values=output.past_key_values, tier="split"
    ).logits
    other.batch_select_indices(rows)
    other.batch_repeat_interleave(2)
    doubled = rows.repeat_interleave(2)
    found = compiled(input_ids=token[doubled], attention_mask=mask[doubled], past_key_values=other, tier="split").logits
    assert_close(found, expected[doubled])


def test_states_cannot_forget() -> None:
    batch = conversation_batch(CONVOLUTION, ONE_ROW)
    compiled = compile_eagerly(batch.model, split_policy())
    cache = compiled(**batch.inputs).past_key_values
    cache.crop(cache.get_seq_length())
    with pytest.raises(UnsupportedUsageError, match="cannot forget their last tokens"):
        cache.crop(-1)


def test_a_cache_with_the_states_of_another_model_is_refused() -> None:
    batch = conversation_batch(CONVOLUTION, ONE_ROW)
    cache = batch.model(**batch.inputs).past_key_values
    mask = torch.nn.functional.pad(batch.inputs["attention_mask"], (0, 1), value=1)
    with pytest.raises(UnsupportedUsageError, match="filled by another model"):
        compile_eagerly(batch.model, split_policy())(
            input_ids=torch.tensor([[20]]), attention_mask=mask, past_key_values=cache
        )


# --- together with other features


@torch.no_grad()
@pytest.mark.conformance
def test_compiled_by_inductor() -> None:
    batch = make_batch(CONVOLUTION, TWO_ROWS)
    settings = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    eager, compiled = (
        compile_eagerly(batch.model, split_policy(), backend=backend, debug=False).generate(**batch.inputs, **settings)
        for backend in ("eager", "inductor")
    )
    assert torch.equal(compiled.sequences, eager.sequences)
    assert_close(torch.stack(compiled.logits), torch.stack(eager.logits))


@torch.no_grad()
def test_adapters_on_mixers() -> None:
    batch = conversation_batch(DELTA, TWO_ROWS)
    names = ["in_proj_qkv", "out_proj", "q_proj"]
    adapted = peft.get_peft_model(batch.model, peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False))
    model = adapted.base_model.model.eval()
    compiled = compile_eagerly(model, split_policy())
    batch = replace(batch, model=model)
    assert_close(compiled(**batch.inputs, logits_to_keep=1).logits, reference(batch, split_policy())[:, -1:])
    assert_forward_matches(compiled, batch, split_policy(), None)


@torch.no_grad()
def test_bfloat16_is_the_original_at_100_percent() -> None:
    for family in (DELTA, CONVOLUTION):
        model = family.build(dtype=torch.bfloat16)
        inputs = family.make_inputs(model, TWO_ROWS)
        compiled = compile_eagerly(model, Policy.full(4))
        assert torch.equal(compiled(**inputs).logits, model(**inputs).logits)


def test_threads_have_states_of_their_own() -> None:
    batches = [make_batch(CONVOLUTION, rows, seed=n) for n, rows in enumerate((ONE_ROW, TWO_ROWS))]
    compiled = compile_eagerly(batches[0].model, split_policy())
    settings = {"max_new_tokens": 4, "do_sample": False}
    expected = [compiled.generate(**batch.inputs, **settings) for batch in batches]
    found: list[list[Tensor]] = [[], []]

    def run(number: int) -> None:
        found[number] += [compiled.generate(**batches[number].inputs, **settings) for _ in range(4)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(answer, expected[number]) for number in range(2) for answer in found[number])
    assert [len(answers) for answers in found] == [4, 4]
