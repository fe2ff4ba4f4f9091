"""What runs inside one `generate`: its own prompt, second streams, further generates, and generate's own arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from dop_compile import Policy
from dop_compile.drop_in.streams import Streams
from dop_compile.errors import UnsupportedUsageError
from tests.conformance.q_formers import Q_FORMERS
from tests.families import FAMILIES
from tests.reference import reference_generate
from tests.support import Batch, compile_eagerly, make_batch, relative_error

ROWS = [[("text", 5), ("image",), ("text", 4)], [("image", 1), ("text", 3)]]
TEXT_PRUNED = Policy.from_operations(4, [("text", layer, kind) for layer in (1, 2, 3) for kind in ("mlp", "mha_query")])
PRUNED = Policy.depthwise(4, mha_query_depth=1, mha_key_value_depth=3, mlp_depth=2)
TIERS = {"100%": Policy.full(4), "pruned": PRUNED}
SCALE = 1.7
PICTURES = ("attention_mask", "pixel_values", "mm_encoder_outputs")


def guided(model: Any, batch: Batch, negative: Tensor | None, **settings: Any) -> Any:
    return model.generate(
        **batch.inputs,
        **settings,
        max_new_tokens=3,
        do_sample=False,
        guidance_scale=SCALE,
        negative_prompt_ids=negative,
        return_dict_in_generate=True,
        output_scores=True,
    )


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(
    ("negative", "use_cache"), [(None, True), (2, False), (20, True)], ids=["last token", "no cache", "long"]
)
@torch.no_grad()
def test_guidance_is_the_arithmetic_of_two_sessions(name: str, negative: int | None, use_cache: bool) -> None:
    batch = make_batch(name, ROWS[:1] if name == "qwen2_5_vl" else ROWS)
    compiled = compile_eagerly(batch.model, TEXT_PRUNED)
    ids = batch.inputs["input_ids"]
    generator = torch.Generator().manual_seed(0)
    other = None if negative is None else torch.randint(20, 100, (len(ids), negative), generator=generator)
    found = guided(compiled, batch, other, use_cache=use_cache)
    by_hand = guided_by_hand if use_cache else guided_without_cache
    expected = by_hand(compiled, batch, other, found.sequences)
    for score, own in zip(found.scores, expected, strict=True):
        assert relative_error(score, own) < 1e-5


def combined(conditional: Tensor, unconditional: Tensor) -> Tensor:
    a, b = (logits[:, -1].float().log_softmax(-1) for logits in (conditional, unconditional))
    return SCALE * (a - b) + b


def guided_by_hand(model: Any, batch: Batch, negative: Tensor | None, sequences: Tensor) -> list[Tensor]:
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    first = model(**batch.inputs, use_cache=True)
    second = model(input_ids=ids[:, -1:] if negative is None else negative, use_cache=True)
    scores = [combined(first.logits, second.logits)]
    for step in range(2):
        token = sequences[:, ids.shape[1] + step : ids.shape[1] + step + 1]
        mask = F.pad(mask, (0, 1), value=1)
        padded = {} if bool(mask.all()) else {"attention_mask": mask}
        first = model(input_ids=token, **padded, past_key_values=first.past_key_values)
        second = model(input_ids=token, past_key_values=second.past_key_values)
        scores.append(combined(first.logits, second.logits))
    return scores


def guided_without_cache(model: Any, batch: Batch, negative: Tensor | None, sequences: Tensor) -> list[Tensor]:
    """Prompt and output told apart by a `generate` of each stream's own, forced to the tokens that were found."""
    ids = batch.inputs["input_ids"]
    tokens = sequences[:, ids.shape[1] :]
    prompt = ids[:, -1:] if negative is None else negative
    streams = [forced(model, batch.inputs, tokens), forced(model, {"input_ids": prompt}, tokens)]
    return [combined(a[:, None], b[:, None]) for a, b in zip(*streams, strict=True)]


def forced(model: Any, inputs: dict[str, Tensor], tokens: Tensor) -> tuple[Tensor, ...]:
    step = iter(tokens.T)

    def force(ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).scatter(1, next(step)[:, None], 0.0)

    output = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, use_cache=False, logits_processor=[force],
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    logits: tuple[Tensor, ...] = output.logits
    return logits


BY_A_PART = {name: family for name, family in Q_FORMERS.items() if "blip" in name}


@pytest.mark.parametrize("family", BY_A_PART.values(), ids=BY_A_PART)
def test_guidance_of_models_that_generate_by_a_part(family: Any) -> None:
    batch = make_batch(family, ROWS)
    compiled = compile_eagerly(batch.model, Policy.full(family.num_layers))
    settings = {"max_new_tokens": 3, "do_sample": False, "guidance_scale": 1.5}
    assert torch.equal(compiled.generate(**batch.inputs, **settings), batch.model.generate(**batch.inputs, **settings))


def test_a_contrastive_loop_of_the_callers_own() -> None:
    """The picture's stream against one without: each with a cache of its own, as in visual contrastive decoding."""
    batch = make_batch("llava", ROWS[:1])
    compiled = compile_eagerly(batch.model, TEXT_PRUNED)
    bare = batch.inputs["input_ids"][:, :5]

    def loop(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        inputs = {name: kwargs[name] for name in PICTURES if kwargs.get(name) is not None}
        second = model(input_ids=bare, past_key_values=DynamicCache(), use_cache=True)
        first = model(input_ids=input_ids, **inputs, past_key_values=kwargs["past_key_values"], use_cache=True)
        scores = [first.logits[:, -1] - second.logits[:, -1]]
        for _ in range(2):
            token = scores[-1].argmax(-1, keepdim=True)
            first = model(input_ids=token, past_key_values=first.past_key_values)
            second = model(input_ids=token, past_key_values=second.past_key_values)
            scores.append(first.logits[:, -1] - second.logits[:, -1])
        return torch.stack(scores)

    with torch.no_grad():
        expected = loop(
            compiled,
            batch.inputs["input_ids"],
            pixel_values=batch.inputs["pixel_values"],
            past_key_values=DynamicCache(),
        )
    found = compiled.generate(**batch.inputs, custom_generate=loop, max_new_tokens=3)
    assert relative_error(found, expected) < 1e-5


def test_a_loop_that_calls_generate_keeps_the_tier() -> None:
    batch = make_batch("llava", ROWS[:1])
    compiled = compile_eagerly(batch.model, TIERS)

    def loop(model: Any, input_ids: Tensor, *, inner: dict[str, Any], **kwargs: Any) -> Any:
        return model.generate(**batch.inputs, max_new_tokens=4, do_sample=False, **inner)

    def tokens(model: Any, inner: dict[str, Any], **arguments: Any) -> Any:
        output = model.generate(**batch.inputs, custom_generate=loop, inner=inner, max_new_tokens=4, **arguments)
        return output[:, -4:].tolist()

    full, pruned = (reference_generate(batch.model, batch.inputs, TIERS[tier], 4) for tier in TIERS)
    assert full != pruned
    assert tokens(compiled, {}, tier="pruned") == pruned
    assert tokens(compiled.tier("pruned"), {}) == pruned
    assert tokens(compiled, {}) == full
    assert tokens(compiled, {"tier": "pruned"}) == pruned
    assert tokens(compiled, {"tier": "100%"}, tier="pruned") == full


def test_a_tier_named_inside_generate_is_refused() -> None:
    batch = make_batch("llava", ROWS[:1])
    compiled = compile_eagerly(batch.model, TIERS)

    def loop(model: Any, input_ids: Tensor, *, tier: str, **kwargs: Any) -> Any:
        return model(**batch.inputs, tier=tier).logits

    with pytest.raises(UnsupportedUsageError, match="tier was given to a call inside generate"):
        compiled.generate(**batch.inputs, custom_generate=lambda m, i, **k: loop(m, i, tier="pruned"), max_new_tokens=1)
    same = compiled.generate(
        **batch.inputs, custom_generate=lambda m, i, **k: loop(m, i, tier="100%"), max_new_tokens=1
    )
    assert torch.equal(same, compiled(**batch.inputs).logits)


class Tokens:
    """Stands for a tokenizer; without stop strings nothing asks it for anything."""


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "llama"])
def test_arguments_of_generate_itself_pass(name: str) -> None:
    batch = make_batch(name)
    compiled = compile_eagerly(batch.model, Policy.full(FAMILIES[name].num_layers))
    settings = {"max_new_tokens": 3, "do_sample": False, "tokenizer": Tokens()}
    expected = batch.model.generate(**batch.inputs, **settings)
    assert torch.equal(compiled.generate(**batch.inputs, **batch.call_arguments(), **settings), expected)


# Streams by themselves.


def test_streams_without_a_cache_are_told_by_their_prompt() -> None:
    streams = Streams()
    streams.begin_generate(3)
    main, other = torch.tensor([[1, 2, 3]]), torch.tensor([[3]])
    assert streams.of_call(None, main, 0, 3).main
    second = streams.of_call(None, other, 0, 1)
    assert (second.main, second.prompt_columns) == (False, 1)
    assert streams.of_call(None, F.pad(main, (0, 1), value=9), 0, 4).main
    assert streams.of_call(None, F.pad(other, (0, 1), value=9), 0, 2) is second
    assert second.prompt_tokens(0, 2) == 1


def test_a_stream_lives_as_long_as_its_cache() -> None:
    streams = Streams()
    streams.begin_generate(3)
    own, other = DynamicCache(), DynamicCache()
    streams.begin_cache(own)
    second = streams.of_call(other, None, 0, 2)
    assert streams.of_call(other, None, 2, 1) is second
    assert streams.of_call(own, None, 0, 3).main
    del other
    assert streams.of_call(own, None, 3, 1).main
    assert len(streams._with_cache) == 1


def test_a_plain_call_is_the_main_stream() -> None:
    streams = Streams()
    stream = streams.of_call(None, torch.tensor([[1, 2]]), 0, 2)
    assert stream.main
    assert (stream.prompt_tokens(0, 2), stream.prompt_tokens(2, 1), stream.prompt_tokens(2, 2)) == (2, 0, 2)
