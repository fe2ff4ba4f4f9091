"""Methods and settings set on an instance, before and after compiling, are what the compiled model runs with.

The oracle is the masked original, which runs with them because it is the instance that they were set on.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from dop_compile import Policy
from dop_compile.errors import UnsupportedModelError, UnsupportedUsageError
from tests.families import FAMILIES, IMAGE
from tests.reference import reference_generate
from tests.support import ONE_IMAGE, Batch, assert_close, compile_eagerly, make_batch, reference

PRUNED = Policy.depthwise(4, mha_query_depth=1, mha_key_value_depth=3, mlp_depth=2)
TIERS = {"100%": Policy.full(4), "pruned": PRUNED}


def own_batch(name: str = "llava") -> Batch:
    return make_batch(name, ONE_IMAGE, model=FAMILIES[name].build())


def half(output: Any) -> Any:
    output.pooler_output = [part * 0.5 for part in output.pooler_output]
    return output


def by_closure(owner: nn.Module) -> None:
    original = owner.get_image_features

    @functools.wraps(original)  # transformers reads the names of its arguments
    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        return half(original(*args, **kwargs))

    owner.get_image_features = get_image_features


def by_method(owner: nn.Module) -> None:
    @functools.wraps(type(owner).get_image_features)
    def get_image_features(self: Any, *args: Any, **kwargs: Any) -> Any:
        return half(type(self).get_image_features(self, *args, **kwargs))

    owner.get_image_features = types.MethodType(get_image_features, owner)


def by_partial(owner: nn.Module) -> None:
    @functools.wraps(type(owner).get_image_features)
    def get_image_features(owner: Any, *args: Any, **kwargs: Any) -> Any:
        return half(type(owner).get_image_features(owner, *args, **kwargs))

    owner.get_image_features = functools.partial(get_image_features, owner)


@pytest.mark.parametrize("patch", [by_closure, by_method, by_partial])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@torch.no_grad()
def test_patched_features(patch: Callable[[nn.Module], None], after: bool) -> None:
    batch = own_batch()
    plain = reference(batch, PRUNED)
    if not after:
        patch(batch.model.model)
    compiled = compile_eagerly(batch.model, TIERS)
    view = compiled.tier("pruned")
    if after:
        assert_close(view(**batch.inputs).logits, plain)
        patch(batch.model.model)
    expected = reference(batch, PRUNED)
    assert not torch.allclose(expected, plain)
    for model in (compiled, view, compiled.tier("pruned")):
        assert_close(model(**batch.inputs, tier="pruned").logits, expected)
        tokens = model.generate(**batch.inputs, tier="pruned", max_new_tokens=3, do_sample=False)
        assert tokens[:, -3:].tolist() == reference_generate(batch.model, batch.inputs, PRUNED, 3)
    del batch.model.model.get_image_features
    assert_close(compiled(**batch.inputs, tier="pruned").logits, plain)


@torch.no_grad()
def test_features_patched_on_the_compiled_model() -> None:
    batch, other = own_batch(), own_batch()
    compiled = compile_eagerly(batch.model, TIERS)
    by_closure(compiled.model)
    by_closure(other.model.model)
    for model in (compiled, compiled.tier("pruned")):
        assert_close(model(**batch.inputs, tier="pruned").logits, reference(other, PRUNED))
    assert "get_image_features" not in vars(batch.model.model)


@torch.no_grad()
def test_reducers_see_the_tower_under_a_patched_method() -> None:
    """The patch leads to this call's own modules, whose tower is watched."""
    batch = own_batch()
    policy = Policy.full(4).replace(visual_tokens=4, reducer="vispruner")
    expected = compile_eagerly(batch.model, policy)(**batch.inputs).logits
    original = batch.model.model.get_image_features
    batch.model.model.get_image_features = lambda *args, **kwargs: original(*args, **kwargs)
    assert torch.equal(compile_eagerly(batch.model, policy)(**batch.inputs).logits, expected)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@torch.no_grad()
def test_a_patched_placeholder_mask(after: bool) -> None:
    """The last placeholder is declared text: it is no visual token then, and is not pruned."""

    def patch(owner: Any) -> None:
        original = owner.get_placeholder_mask

        def get_placeholder_mask(input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            seen.append(1)
            return original(input_ids, *args, **kwargs)

        owner.get_placeholder_mask = get_placeholder_mask

    seen: list[int] = []
    batch = own_batch()
    if not after:
        patch(batch.model.model)
    compiled = compile_eagerly(batch.model, PRUNED)
    if after:
        compiled(**batch.inputs)
        patch(batch.model.model)
    seen.clear()
    for _ in range(2):
        assert_close(compiled(**batch.inputs).logits, reference_without_patch(batch))
    assert len(seen) == 2


def reference_without_patch(batch: Batch) -> Tensor:
    own = vars(batch.model.model).pop("get_placeholder_mask")
    expected = reference(batch, PRUNED)
    batch.model.model.get_placeholder_mask = own
    return expected


@pytest.mark.parametrize("where", ["before", "after", "compiled"])
def test_another_loss(where: str) -> None:
    batch = own_batch()

    def loss(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
        return logits[labels == IMAGE].sum()

    if where == "before":
        batch.model.loss_function = loss
    compiled = compile_eagerly(batch.model, TIERS)
    view = compiled.tier("pruned")
    if where != "before":
        view(**batch.inputs, labels=batch.inputs["input_ids"])
        (batch.model if where == "after" else compiled).loss_function = loss
    for model in (compiled, view, compiled.tier("100%")):
        output = model(**batch.inputs, labels=batch.inputs["input_ids"])
        assert output.loss == output.logits[batch.inputs["input_ids"] == IMAGE].sum()


def lengths(models: list[Any], batch: Batch) -> list[int]:
    prompt = batch.inputs["input_ids"].shape[1]
    return [model.generate(**batch.inputs, do_sample=False).shape[1] - prompt for model in models]


def test_generation_settings_of_the_original_are_followed_after_compiling() -> None:
    batch = own_batch()
    batch.model.generation_config.max_new_tokens = 5
    compiled = compile_eagerly(batch.model, TIERS)
    models = [compiled, compiled.tier("pruned")]
    assert lengths(models, batch) == [5, 5]
    batch.model.generation_config.max_new_tokens = 3
    assert lengths(models, batch) == [3, 3]
    batch.model.generation_config = GenerationConfig(max_new_tokens=2)
    assert lengths([*models, compiled.tier("pruned")], batch) == [2, 2, 2]


def test_generation_settings_of_the_compiled_model_are_its_own_and_its_views() -> None:
    batch = own_batch()
    batch.model.generation_config.max_new_tokens = 5
    compiled = compile_eagerly(batch.model, TIERS)
    early = compiled.tier("pruned")
    compiled.generation_config = GenerationConfig(max_new_tokens=2)
    assert lengths([compiled, early, compiled.tier("pruned")], batch) == [2, 2, 2]
    early.generation_config = GenerationConfig(max_new_tokens=4)
    batch.model.generation_config.max_new_tokens = 3
    assert lengths([compiled, early, batch.model], batch) == [2, 4, 3]


# generate itself.


def test_a_generate_that_stands_on_the_original_runs_the_compiled_model() -> None:
    """As transformers puts one there for checkpoints that bring their own."""
    batch = own_batch()
    settings = {"max_new_tokens": 4, "do_sample": False}

    def custom(model: Any, **kwargs: Any) -> Any:
        return type(model).generate(model, **kwargs)

    expected = compile_eagerly(batch.model, PRUNED).generate(**batch.inputs, **settings)
    compiled = compile_eagerly(batch.model, TIERS)
    batch.model.generate = functools.partial(custom, model=batch.model)
    assert torch.equal(compiled.generate(**batch.inputs, **settings, tier="pruned"), expected)
    assert torch.equal(compile_eagerly(batch.model, PRUNED).generate(**batch.inputs, **settings), expected)


def test_a_generate_that_does_not_lead_to_the_model_is_refused() -> None:
    batch = own_batch()
    compiled = compile_eagerly(batch.model, PRUNED)
    batch.model.generate = lambda **_: torch.zeros(1, 3)
    with pytest.raises(UnsupportedUsageError, match="generate of LlavaForConditionalGeneration was replaced"):
        compiled.generate(**batch.inputs)
    with pytest.raises(UnsupportedModelError, match="generate of LlavaForConditionalGeneration was replaced"):
        compile_eagerly(batch.model, PRUNED)


@pytest.mark.parametrize("path", ["model", "model.language_model"])
def test_a_forward_replaced_inside_the_compiled_model_is_refused(path: str) -> None:
    batch = own_batch()
    compiled = compile_eagerly(batch.model, PRUNED)
    module = compiled.get_submodule(path)
    module.forward = functools.partial(type(module).forward, module)
    with pytest.raises(UnsupportedUsageError, match=rf"forward of {path} was replaced on the compiled model"):
        compiled(**batch.inputs)


# Compiled in place.


def no_compiler(graph: Any, inputs: Any) -> Any:
    return graph.forward


@torch.no_grad()
def test_a_model_compiled_in_place_before() -> None:
    batch = own_batch()
    expected = reference(batch, PRUNED)
    tokens = reference_generate(batch.model, batch.inputs, PRUNED, 4)
    batch.model.compile(backend=no_compiler)
    batch.model.model.compile(backend=no_compiler)
    batch.model.get_decoder().compile(backend=no_compiler)
    batch.model.get_decoder().layers[1].compile(backend=no_compiler)
    compiled = compile_eagerly(batch.model, TIERS)
    assert_close(compiled(**batch.inputs, tier="pruned").logits, expected)
    assert compiled.generate(**batch.inputs, tier="pruned", max_new_tokens=4)[:, -4:].tolist() == tokens


def test_a_compiled_model_compiled_in_place_keeps_its_tiers() -> None:
    batch = own_batch()
    tokens = reference_generate(batch.model, batch.inputs, PRUNED, 4)
    compiled = compile_eagerly(batch.model, TIERS)
    compiled.compile(backend=no_compiler)
    for model in (compiled, compiled.tier("pruned")):
        assert model.generate(**batch.inputs, tier="pruned", max_new_tokens=4)[:, -4:].tolist() == tokens


@pytest.mark.parametrize("way", ["compile", "forward", "module"])
def test_a_compiled_vision_tower(way: str) -> None:
    batch = own_batch()
    policy = Policy.full(4).replace(visual_tokens=4, reducer="vispruner")
    expected = compile_eagerly(batch.model, policy)(**batch.inputs).logits
    tower = batch.model.model.vision_tower
    if way == "compile":
        tower.compile(backend=no_compiler)
    elif way == "forward":
        tower.forward = torch.compile(tower.forward, backend=no_compiler)
    else:
        batch.model.model.vision_tower = torch.compile(tower, backend=no_compiler)
    assert_close(compile_eagerly(batch.model, policy)(**batch.inputs).logits, expected)
