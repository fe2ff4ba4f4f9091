"""`compiled.warmup`: nothing is compiled or traced afterwards for the calls that it names, and nothing has changed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dop_compile import Policy, Warmup, dop_compile
from tests.families import FAMILIES, IMAGE
from tests.support import compile_eagerly, shared_model

LAYERS = 4
TIERS = {
    "100%": Policy.full(LAYERS),
    "split": Policy.depthwise(LAYERS, mha_query_depth=1, mha_key_value_depth=3, mlp_depth=1),
    "joint": Policy.depthwise(LAYERS, mha_depth=3, mlp_depth=2, visual_tokens=5),
}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def as_it_is(graph: Any, example_inputs: list[Tensor]) -> Any:
    """A backend of torch.compile that leaves a graph as it is."""
    return graph.forward


def rows(name: str, model: nn.Module, *texts: int) -> dict[str, Tensor]:
    """A batch of prompts with one picture, by the text tokens behind it."""
    return FAMILIES[name].make_inputs(model, [[("text", 4), ("image",), ("text", text)] for text in texts])


def answer(compiled: Any, inputs: dict[str, Any], **settings: Any) -> Tensor:
    result: Tensor = compiled.generate(**inputs, max_new_tokens=4, do_sample=False, **settings)
    return result


def first_work(compiled: Any) -> tuple[int, int, int]:
    """What first calls add to: decoders, kinds of pieces, and graphs that torch.compile was given."""
    return len(compiled.dop.programs), len(compiled.dop.library), counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_nothing_is_compiled_afterwards(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    layers = family.num_layers
    split = Policy.depthwise(layers, mha_query_depth=1, mha_key_value_depth=3, mlp_depth=1)
    tiers = {"split": split, "joint": Policy.depthwise(layers, mha_depth=3, mlp_depth=2, visual_tokens=5)}
    compiled = dop_compile(model, tiers, backend=as_it_is)
    record = compiled.warmup(batch_sizes=(1, 2), padded=True, inputs=rows(name, model, 6), progress=False)
    done = first_work(compiled)
    assert (record.compilations, sum(call.programs for call in record.calls)) == (done[2], done[0] - 1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tier in tiers:
            for texts in ((9,), (7, 7), (30, 30, 30), (4, 9), (5, 40, 11)):
                answer(compiled, rows(name, model, *texts), tier=tier)
    assert first_work(compiled) == done


def test_a_padded_batch_shares_what_is_compiled() -> None:
    """Whichever of two comes first, in whatever tier."""
    model = FAMILIES["llava"].build()
    for first, second in (((6, 6), (3, 9, 5)), ((3, 9), (6, 6, 6))):
        torch._dynamo.reset()
        compiled = dop_compile(model, TIERS, backend=as_it_is)
        for tier in TIERS:
            answer(compiled, rows("llava", model, *first), tier=tier)
            done = first_work(compiled)
            answer(compiled, rows("llava", model, *second), tier=tier)
            assert first_work(compiled) == done


@torch.no_grad()
def test_made_prompts_are_the_models() -> None:
    """With inputs made of the configuration a prompt of a processor finds everything compiled."""
    model = FAMILIES["llava"].build()
    compiled = dop_compile(model, TIERS, backend=as_it_is)
    compiled.warmup(text_lengths=(5, 9), progress=False)
    done = first_work(compiled)
    for tier in TIERS:
        answer(compiled, rows("llava", model, 12), tier=tier)
    assert first_work(compiled) == done


def test_the_record_names_what_was_warmed() -> None:
    compiled: Any = compile_eagerly(FAMILIES["llava"].build(), TIERS)
    record = compiled.warmup(
        batch_sizes=(1, 3, 3), text_lengths=(5, 9), tiers=["split", "joint"], padded=True, progress=False
    )
    assert isinstance(record, Warmup)
    kinds = [(call.tier, call.batch_size, call.tokens, call.padded) for call in record.calls]
    lengths = [(18, False), (21, True), (22, False), (25, True)]  # of 4 system and 9 visual tokens, and text
    assert kinds == [(tier, size, *length) for tier in ("split", "joint") for size in (1, 3) for length in lengths]
    assert all(call.seconds > 0 for call in record.calls)
    assert record.seconds == sum(call.seconds for call in record.calls)
    assert record.compilations == 0, "nothing is compiled in eager mode"
    lines = str(record).splitlines()
    assert len(lines) == 2 + len(kinds)
    assert lines[0].split() == ["tier", "batch", "tokens", "padded", "programs", "compiled", "seconds"]
    assert lines[2].split()[:4] == ["split", "1", "21", "yes"]


def test_nothing_of_the_callers_is_changed(capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = FAMILIES["llava"].build()
    model.generation_config.update(do_sample=True, temperature=2.0, max_length=17, min_length=3)
    compiled: Any = compile_eagerly(model, TIERS)
    inputs = rows("llava", model, 6)
    expected = answer(compiled, inputs)
    given = {name: value.clone() for name, value in inputs.items()}
    settings = [one.generation_config.to_dict() for one in (model, compiled)]
    attributes = [dict(vars(one)) for one in (model, compiled)]
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())

    def draw(*_: Any) -> None:
        random.random(), np.random.rand(), torch.rand(1)

    hook = compiled.register_forward_pre_hook(draw)
    compiled.warmup(batch_sizes=(2,), padded=True, inputs=inputs)
    hook.remove()
    assert "warming" in capsys.readouterr().err
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]
    assert [one.generation_config.to_dict() for one in (model, compiled)] == settings
    assert [vars(one) for one in (model, compiled)] == attributes
    assert inputs.keys() == given.keys()
    assert all(torch.equal(inputs[name], given[name]) for name in given)
    assert torch.equal(answer(compiled, inputs), expected)
    compiled.warmup(inputs=inputs, tiers=["100%"], progress=False)
    assert capsys.readouterr().err == ""


def prompts_seen(compiled: Any, **arguments: Any) -> list[dict[str, Any]]:
    """Prefills of a warm-up."""
    seen: list[dict[str, Any]] = []

    def note(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].shape[1] > 1:
            seen.append(kwargs)

    hook = compiled.register_forward_pre_hook(note, with_kwargs=True)
    compiled.warmup(progress=False, **arguments)
    hook.remove()
    return seen


def test_padded_rows_have_the_prompts_own_parts() -> None:
    """The first row is the prompt behind padding; the others are as long, with more of its last text."""
    model = FAMILIES["llava"].build()
    compiled: Any = compile_eagerly(model, TIERS)
    inputs = rows("llava", model, 6)
    whole, padded = prompts_seen(compiled, batch_sizes=(3,), padded=True, inputs=inputs, tiers=["joint"])
    ids = inputs["input_ids"]
    assert torch.equal(whole["input_ids"], ids.expand(3, -1))
    extra = padded["input_ids"].shape[1] - ids.shape[1]
    assert extra > 0
    assert torch.equal(padded["input_ids"][:1, extra:], ids)
    assert torch.equal(padded["input_ids"][1:, :-extra], ids.expand(2, -1))
    assert (padded["input_ids"][1:, -extra:] == ids[0, -1]).all()
    mask = torch.ones_like(padded["input_ids"])
    mask[0, :extra] = 0
    assert torch.equal(padded["attention_mask"], mask)
    assert (padded["input_ids"] == IMAGE).sum(1).tolist() == [9, 9, 9]


def test_text_lengths_make_a_given_prompt_longer() -> None:
    model = FAMILIES["llava"].build()
    compiled: Any = compile_eagerly(model, TIERS)
    inputs = rows("llava", model, 6)
    seen = prompts_seen(compiled, text_lengths=(6, 11), inputs=inputs, tiers=["split"])
    assert [prompt["input_ids"].shape[1] for prompt in seen] == [19, 24]
    with pytest.raises(ValueError, match="text_lengths: the prompt given has 6 text tokens already, and 5 are asked"):
        compiled.warmup(text_lengths=(5,), inputs=inputs)


def test_prompts_of_several_kinds() -> None:
    """One with a picture and one without: both find their programs afterwards."""
    model = FAMILIES["llava"].build()
    compiled: Any = compile_eagerly(model, TIERS)
    texts = FAMILIES["llava"].make_inputs(model, [[("text", 8)]])
    compiled.warmup(inputs=[rows("llava", model, 6), texts], progress=False)
    done = len(compiled.dop.programs)
    for tier in TIERS:
        answer(compiled, rows("llava", model, 9), tier=tier)
        answer(compiled, FAMILIES["llava"].make_inputs(model, [[("text", 11)]]), tier=tier)
    assert len(compiled.dop.programs) == done


def test_groups_and_indices_of_the_caller_are_repeated() -> None:
    given = Policy.depthwise(LAYERS, mha_depth=2, visual_tokens=3, reducer="given")
    compiled: Any = compile_eagerly(shared_model("llama"), {"given": given, "split": TIERS["split"]})
    ids = torch.arange(20, 34)[None]
    inputs = {"input_ids": ids, "token_groups": torch.tensor([[2, 2, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]])}
    record = compiled.warmup(
        batch_sizes=(2,), padded=True, inputs={**inputs, "visual_indices": [[0, 2, 3]]}, progress=False
    )
    assert [(call.tier, call.tokens) for call in record.calls] == [
        (tier, tokens) for tier in ("given", "split") for tokens in (14, 17)
    ]
    with pytest.raises(ValueError, match="pass visual_indices="):
        compiled.warmup(tiers=["given"], inputs=inputs, progress=False)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_sizes": ()}, ValueError, "batch_sizes: expected at least one"),
        ({"batch_sizes": 4}, TypeError, r"batch_sizes: expected whole numbers such as \(1, 4\), got 4"),
        ({"batch_sizes": (1, 0)}, ValueError, "batch_sizes: expected an integer >= 1, got 0"),
        ({"text_lengths": (True,)}, TypeError, "text_lengths: expected an integer"),
        ({"tiers": "split"}, TypeError, "tiers: expected names of tiers in a list, got 'split'"),
        ({"tiers": []}, ValueError, "tiers: expected at least one name"),
        ({"tiers": ["fast"]}, ValueError, "tier 'fast' does not exist; this model was compiled with 100%, split"),
        ({"inputs": []}, ValueError, "inputs: expected at least one prompt"),
        ({"inputs": {"ids": 3}}, TypeError, r"a mapping with input_ids \(1, tokens\), got dict"),
        ({"inputs": {"input_ids": torch.ones(2, 3)}}, TypeError, r"got input_ids of \(2, 3\)"),
        ({"inputs": {"input_ids": torch.full((1, 3), IMAGE)}}, ValueError, "no text behind its pictures"),
        (
            {"inputs": {"input_ids": torch.ones(1, 3), "attention_mask": torch.tensor([[0, 1, 1]])}},
            ValueError,
            "the prompt is padded",
        ),
        (
            {"inputs": {"input_ids": torch.ones(1, 3), "position_ids": torch.ones(1, 3)}},
            ValueError,
            "position_ids cannot be repeated",
        ),
    ],
)
def test_what_cannot_be_warmed_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    compiled: Any = compile_eagerly(shared_model("llava"), TIERS)
    with pytest.raises(error, match=message):
        compiled.warmup(**arguments)


@pytest.mark.parametrize(
    ("name", "message"),
    [("llama", "text-only model.*pass inputs=.*token_groups"), ("qwen2_5_vl", "does not say what a picture is.*pass")],
)
def test_inputs_are_asked_for_where_the_configuration_says_too_little(name: str, message: str) -> None:
    compiled: Any = compile_eagerly(shared_model(name), {"split": TIERS["split"]})
    with pytest.raises(ValueError, match=message):
        compiled.warmup()


@pytest.mark.conformance
@pytest.mark.inductor
def test_inductor_compiles_nothing_afterwards() -> None:
    """Its calls past the guards, too, are made by then: no place of a program goes through torch.compile again."""
    model = FAMILIES["llava"].build()
    compiled = dop_compile(model, TIERS["joint"])
    compiled.warmup(batch_sizes=(2,), padded=True, inputs=rows("llava", model, 6), progress=False)
    done = first_work(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for texts in ((7, 7), (4, 9, 30), (11, 5)):
            answer(compiled, rows("llava", model, *texts))
    assert first_work(compiled) == done
