"""Wrong input gives an error that names what is wrong, or does what the untouched model does with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, T5Config, T5ForConditionalGeneration

from dop_compile import Policy, dop_compile
from dop_compile.errors import UnsupportedModelError, UnsupportedUsageError
from dop_compile.policy.provenance import Provenance
from dop_compile.reducers import Selection, VisualContext, register, registry
from tests.families import FAMILIES, IMAGE
from tests.support import ONE_IMAGE, compile_eagerly, make_batch, shared_model, without

FULL = Policy.full(4)
GIVEN = Policy.depthwise(4, mha_depth=2, visual_tokens=4, reducer="given")


# Models.


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(2, 2),
        lambda: FAMILIES["llava"].config(),
        lambda: shared_model("llava").get_decoder(),
        lambda: AutoModel.from_config(FAMILIES["llava"].config()),
        lambda: shared_model("llava").model.vision_tower,
    ],
    ids=["module", "config", "decoder alone", "without a head", "vision tower"],
)
def test_what_is_no_generating_model(make: Callable[[], Any]) -> None:
    thing = make()
    with pytest.raises(TypeError, match=rf"can generate.*got {type(thing).__name__}"):
        dop_compile(thing, FULL)


def test_encoder_decoder_model() -> None:
    config = T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=32)
    with pytest.raises(TypeError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        dop_compile(T5ForConditionalGeneration(config), Policy.full(2))


def test_attention_implementation() -> None:
    model = FAMILIES["llava"].build()
    model.get_decoder().config._attn_implementation = "paged|sdpa"
    with pytest.raises(UnsupportedModelError, match=r"'paged\|sdpa' is not supported.*'eager', 'sdpa', 'flex.*'fla"):
        dop_compile(model, FULL)


def test_weights_on_several_devices() -> None:
    model = FAMILIES["llava"].build()
    model.get_decoder().layers[1].to("meta")
    with pytest.raises(UnsupportedModelError, match=r"several devices \(cpu, meta\)"):
        dop_compile(model, FULL)


# Policies and other arguments of dop_compile.


def test_policy_for_another_model() -> None:
    model = shared_model("llava")
    with pytest.raises(ValueError, match=r"tier 'default'.*policy is for 32 layers, the model has 4"):
        dop_compile(model, Policy.full(32))
    with pytest.raises(ValueError, match=r"tier 'b'.*policy is for 5 layers"):
        dop_compile(model, {"a": FULL, "b": Policy.full(5)})
    foreign = FULL.replace(provenance=Provenance(model_fingerprint="0123456789abcdef"))
    with pytest.raises(ValueError, match=r"made for another model.*0123456789ab"):
        dop_compile(model, foreign)
    with pytest.raises(TypeError, match="expected a Policy, got dict"):
        dop_compile(model, {"a": {"num_layers": 4}})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="at least one tier"):
        dop_compile(model, {})
    with pytest.raises(ValueError, match=r"tier 'default': unknown reducer 'cdpruned'; did you mean 'cdpruner'.*trim"):
        dop_compile(model, FULL.replace(reducer="cdpruned"))


def test_an_unknown_backend_is_refused_at_once() -> None:
    model = shared_model("llava")
    with pytest.raises(ValueError, match=r"backend: expected one of .*eager.*, got 'inductr'; did you mean 'inductor'"):
        dop_compile(model, FULL, backend="inductr")
    with pytest.raises(TypeError, match="backend: expected a name or a function, got None"):
        dop_compile(model, FULL, backend=None)  # type: ignore[arg-type]
    for known in ("aot_eager", lambda graph, inputs: graph.forward):
        dop_compile(model, FULL, backend=known)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["no_such_pass", "slice_operations", "annotate"])
def test_pass_that_cannot_be_disabled(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is not an optional pass; choose from remove_dead"):
        dop_compile(shared_model("llava"), FULL, backend="eager", disable_passes=[name])


def test_unknown_tier() -> None:
    batch = make_batch("llava", ONE_IMAGE)
    compiled = compile_eagerly(batch.model, {"100%": FULL, "50%": FULL})
    for call in (
        lambda: compiled(**batch.inputs, tier="28%"),
        lambda: compiled.generate(**batch.inputs, tier="28%"),
        lambda: compiled.tier("28%"),
    ):
        with pytest.raises(ValueError, match=r"tier '28%' does not exist.*100%, 50%"):
            call()


# Prompts.


def test_placeholders_and_images_that_do_not_match() -> None:
    """The untouched model's own errors, and its own answer for placeholders without any image."""
    batch = make_batch("llava", [[("text", 4), ("image",), ("text", 3), ("image",), ("text", 1)]])
    compiled = compile_eagerly(batch.model, GIVEN)
    some = batch.inputs | {"pixel_values": batch.inputs["pixel_values"][:1]}
    messages = []
    for model, arguments in ((batch.model, {}), (compiled, {"visual_indices": [[0, 1, 2, 3]]})):
        with pytest.raises(ValueError, match="Image features and image tokens do not match") as caught:
            model(**some, **arguments)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    none = without(batch.inputs, "pixel_values")
    full = compile_eagerly(batch.model, FULL)
    assert torch.equal(full(**none).logits, batch.model(**none).logits)


@pytest.mark.parametrize("name", ["llava", "llama"])
def test_empty_prompt(name: str) -> None:
    compiled = compile_eagerly(shared_model(name), FULL)
    empty = torch.zeros(1, 0, dtype=torch.long)
    with pytest.raises(ValueError, match="prompt is empty: input_ids must hold at least one token"):
        compiled(input_ids=empty)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        compiled()


def test_prompt_of_which_nothing_is_left() -> None:
    batch = make_batch("llava", [[("image",)]])
    compiled = compile_eagerly(batch.model, FULL.replace(visual_tokens=0))
    with pytest.raises(ValueError, match="every token of the prompt was removed"):
        compiled(**batch.inputs)


def test_prepared_attention_mask() -> None:
    batch = make_batch("llava", ONE_IMAGE)
    compiled = compile_eagerly(batch.model, FULL)
    tokens = batch.inputs["input_ids"].shape[1]
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool)
    with pytest.raises(UnsupportedUsageError, match=r"attention_mask must be \(batch, tokens\)"):
        compiled(**(batch.inputs | {"attention_mask": mask}))


def test_attention_mask_that_does_not_cover_the_cache() -> None:
    batch = make_batch("llava", ONE_IMAGE)
    compiled = compile_eagerly(batch.model, GIVEN)
    cache = compiled(**batch.inputs, visual_indices=[[0, 1, 2, 3]]).past_key_values
    with pytest.raises(ValueError, match=r"attention_mask is \(1, 1\); with 16 tokens in the cache.*must be \(1, 17\)"):
        compiled(input_ids=torch.tensor([[20]]), attention_mask=torch.ones(1, 1), past_key_values=cache)


def test_compact_positions_with_several_axes() -> None:
    batch = make_batch("qwen2_5_vl", ONE_IMAGE)
    compiled = compile_eagerly(batch.model, GIVEN.replace(positions="compact"))
    with pytest.raises(UnsupportedUsageError, match=r"'compact' is not defined.*M-RoPE"):
        compiled(**batch.inputs, visual_indices=[[0, 1, 2, 3]])


# Visual tokens.


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (None, "pass visual_indices="),
        ([[0, 1, 2]], "3 indices for sample 0, but 4 of its 9 visual tokens are to be kept"),
        ([[0, 1, 2, 2]], "name token 2 more than once"),
        ([[0, 1, 2, 9]], "index 9 for sample 0, which has only 9 visual tokens"),
        ([[0, 1, 2, -1]], "must not be negative"),
        ([[0, 1, 2, 3.0]], "must be integers"),
        ([[0, 1, 2, 3], [0, 1, 2, 3]], "are for 2 samples, but the batch has 1"),
        ([], "are for 0 samples, but the batch has 1"),
        ("0123", "one sequence per sample"),
    ],
)
def test_visual_indices(indices: Any, message: str) -> None:
    batch = make_batch("llava", ONE_IMAGE)
    compiled = compile_eagerly(batch.model, GIVEN)
    with pytest.raises((ValueError, TypeError), match=message):
        compiled(**batch.inputs, visual_indices=indices)
    with pytest.raises((ValueError, TypeError), match=message):
        compiled.generate(**batch.inputs, visual_indices=indices, max_new_tokens=1)


def test_visual_indices_for_another_reducer() -> None:
    batch = make_batch("llava", ONE_IMAGE)
    compiled = compile_eagerly(batch.model, FULL.replace(visual_tokens=4))
    with pytest.raises(ValueError, match="visual_indices are given, but the policy's reducer is 'uniform'"):
        compiled(**batch.inputs, visual_indices=[[0, 1, 2, 3]])


class BadReducer:
    """What somebody's reducer may return by mistake, by the option `kind`."""

    name = "bad"
    requires: frozenset[str] = frozenset()

    def __init__(self, kind: str):
        self.kind = kind

    def __call__(self, context: VisualContext, count: int) -> Any:
        indices = torch.arange(count)
        features = torch.zeros(count, context.projected.shape[1])
        wrong = {
            "duplicates": Selection(torch.zeros_like(indices)),
            "range": Selection(indices + context.tokens),
            "number": Selection(indices[1:]),
            "floats": Selection(indices.float()),
            "list": indices.tolist(),
            "nan": Selection(indices, features=features / 0),
            "shape": Selection(indices, features=features[:, 1:]),
        }
        return wrong[self.kind]


@pytest.fixture
def bad_reducer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_factories", dict(registry._factories))
    register("bad", BadReducer)


@pytest.mark.usefixtures("bad_reducer")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("duplicates", "indices contain 0 more than once"),
        ("range", "indices contain 9, out of range for 9 visual tokens"),
        ("number", r"indices must have shape \(4,\), as asked for, not \(3,\)"),
        ("floats", "indices must be int64"),
        ("list", "must return a Selection, not list"),
        ("nan", "features contain NaN"),
        ("shape", r"features must have shape \(4, 64\)"),
    ],
)
def test_reducer_of_a_third_party(kind: str, message: str) -> None:
    batch = make_batch("llava", ONE_IMAGE)
    policy = Policy.depthwise(4, visual_tokens=4, reducer="bad", reducer_options={"kind": kind})
    compiled = compile_eagerly(batch.model, policy)
    with pytest.raises((ValueError, TypeError), match=f"reducer 'bad'.*{message}"):
        compiled(**batch.inputs)


# Token groups of text-only models.


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (torch.zeros(1, 5, dtype=torch.long), r"token_groups is \(1, 5\); the prompt is \(1, 6\)"),
        (torch.zeros(2, 6, dtype=torch.long), r"token_groups is \(2, 6\); the prompt is \(1, 6\)"),
        (torch.zeros(6, dtype=torch.long), r"must be \(batch, tokens\), got \(6,\)"),
        (torch.full((1, 6), 3), "values are 0 .text., 1 .visual. and 2 .system."),
        (torch.full((1, 6), -1), "values are 0"),
        (lambda ids: ids[:, 1:] * 0, r"token_groups is \(1, 5\)"),
    ],
)
def test_token_groups(groups: Any, message: str) -> None:
    model = shared_model("llama")
    ids = torch.arange(20, 26)[None]
    with pytest.raises(ValueError, match=message):
        compile_eagerly(model, FULL)(input_ids=ids, token_groups=groups)
    with pytest.raises(ValueError, match=message):
        compile_eagerly(model, FULL, token_groups=groups).generate(ids, max_new_tokens=1)


def test_token_groups_function_without_ids() -> None:
    model = shared_model("llama")
    compiled = compile_eagerly(model, FULL, token_groups=lambda ids: ids * 0)
    embeds = model.get_input_embeddings()(torch.tensor([[20, 21]]))
    with pytest.raises(UnsupportedUsageError, match="needs input_ids"):
        compiled(inputs_embeds=embeds)


def test_generated_placeholder_ids_are_output() -> None:
    """Whatever its id: a generated image id is no visual token of the next step."""
    batch = make_batch("llava", ONE_IMAGE)
    policy = Policy.depthwise(4, mha_depth=0, mlp_depth=0)
    compiled = compile_eagerly(batch.model, policy)
    cache = compiled(**batch.inputs).past_key_values
    step = compiled(input_ids=torch.tensor([[IMAGE]]), past_key_values=cache)
    assert all(layer.keys.shape[2] == 8 for layer in step.past_key_values.layers)
