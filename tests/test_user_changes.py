"""What users do to a model after and around `dop_compile`: each change is followed, or refused by name."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from dop_compile import Policy, dop_compile
from dop_compile.errors import UnsupportedModelError, UnsupportedUsageError
from dop_compile.hf.fingerprint import model_fingerprint
from tests.families import FAMILIES
from tests.support import Batch, assert_close, compile_eagerly, make_batch, reference

PRUNED = Policy.depthwise(4, mha_query_depth=1, mha_key_value_depth=3, mlp_depth=2)
FROZEN = Policy.depthwise(4, mha_query_depth=0, mha_key_value_depth=4, mlp_depth=0)
TIERS = {"100%": Policy.full(4), "pruned": PRUNED}


def own_batch(name: str = "llava") -> Batch:
    """A batch for a model that the test may change."""
    return make_batch(name, model=FAMILIES[name].build())


def check(compiled: Any, batch: Batch, policy: Policy = PRUNED) -> None:
    """The compiled model agrees with the oracle as the model is now."""
    with torch.no_grad():
        logits = compiled(**batch.inputs, **batch.call_arguments()).logits
        assert_close(logits[batch.mask], reference(batch, policy)[batch.mask])


@torch.no_grad()
def test_a_module_replaced_after_compilation_is_used() -> None:
    batch = make_batch("llava", model=FAMILIES["llava"].build())
    compiled = compile_eagerly(batch.model, PRUNED)
    before = compiled(**batch.inputs).logits
    layer = batch.model.get_decoder().layers[1]
    other = FAMILIES["llava"].build(seed=7).get_decoder().layers[1]
    for name in ("mlp", "input_layernorm"):
        setattr(layer, name, getattr(other, name))
        after = compiled(**batch.inputs).logits
        assert not torch.equal(after, before)
        assert_close(after[batch.mask], reference(batch, PRUNED)[batch.mask])
        before = after
    layer.self_attn.q_proj = other.self_attn.q_proj
    assert_close(compiled(**batch.inputs).logits[batch.mask], reference(batch, PRUNED)[batch.mask])


@torch.no_grad()
def test_numbers_set_on_modules_after_compilation_are_used() -> None:
    """On those that the graph looks into, which reads their numbers once, and on those that it calls."""
    batch = own_batch()
    compiled = compile_eagerly(batch.model, PRUNED)
    check(compiled, batch)
    layer = batch.model.get_decoder().layers[1]
    for module, name, value in ((layer.self_attn, "scaling", 1.5), (layer.input_layernorm, "variance_epsilon", 0.5)):
        before = compiled(**batch.inputs).logits
        setattr(module, name, value)
        check(compiled, batch)
        assert not torch.allclose(compiled(**batch.inputs).logits, before)


@pytest.mark.parametrize("path", ["lm_head", "model.multi_modal_projector", "model.language_model.norm"])
@torch.no_grad()
def test_a_child_replaced_on_the_original_is_used_and_the_other_way_not(path: str) -> None:
    batch = make_batch("llava", model=FAMILIES["llava"].build())
    compiled = compile_eagerly(batch.model, TIERS)
    compiled(**batch.inputs)
    old = batch.model.get_submodule(path)
    doubled = nn.Sequential(old, Double())
    batch.model.set_submodule(path, doubled)
    for view, policy in ((compiled, TIERS["100%"]), (compiled.tier("pruned"), PRUNED)):
        assert_close(view(**batch.inputs).logits[batch.mask], reference(batch, policy)[batch.mask])
    compiled.set_submodule(path, old)
    assert batch.model.get_submodule(path) is doubled


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_a_decoder_replaced_on_the_original_is_refused() -> None:
    batch = make_batch("llava", model=FAMILIES["llava"].build())
    compiled = compile_eagerly(batch.model, PRUNED)
    batch.model.model.language_model = FAMILIES["llava"].build().model.language_model
    with pytest.raises(UnsupportedUsageError, match=r"model\.language_model was replaced.*compile the model again"):
        compiled(**batch.inputs)


@pytest.mark.parametrize("path", ["mlp", "input_layernorm", "self_attn.q_proj", "self_attn.o_proj"])
@torch.no_grad()
def test_a_hook_added_after_compilation_runs_until_it_is_removed(path: str) -> None:
    batch = make_batch("llava", model=FAMILIES["llava"].build())
    compiled = compile_eagerly(batch.model, PRUNED)
    before = compiled(**batch.inputs).logits
    module = batch.model.get_decoder().layers[1].get_submodule(path)
    handle = module.register_forward_hook(lambda _, args, output: output * 2)
    hooked = compiled(**batch.inputs).logits
    assert not torch.equal(hooked, before)
    assert_close(hooked[batch.mask], reference(batch, PRUNED)[batch.mask])
    handle.remove()
    assert torch.equal(compiled(**batch.inputs).logits, before)


@pytest.mark.parametrize("path", ["", "model", "model.vision_tower", "lm_head"])
@torch.no_grad()
def test_a_hook_outside_the_layers_runs(path: str) -> None:
    batch = make_batch("llava", model=FAMILIES["llava"].build())
    compiled = compile_eagerly(batch.model, PRUNED)
    calls: list[nn.Module] = []
    handle = batch.model.get_submodule(path).register_forward_pre_hook(lambda module, args: calls.append(module))
    compiled(**batch.inputs)
    handle.remove()
    assert len(calls) == 1


@pytest.mark.parametrize("path", ["", "layers.1", "layers.1.self_attn"])
def test_a_hook_on_a_module_that_is_opened_is_refused(path: str) -> None:
    batch = make_batch("llava", model=FAMILIES["llava"].build())
    compiled = compile_eagerly(batch.model, PRUNED)
    handle = batch.model.get_decoder().get_submodule(path).register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match="hook"):
        compiled(**batch.inputs)
    handle.remove()
    compiled(**batch.inputs)


@torch.no_grad()
def test_weights_changed_in_place_are_used() -> None:
    batch = make_batch("llava", model=FAMILIES["llava"].build())
    compiled = compile_eagerly(batch.model, PRUNED)
    compiled(**batch.inputs)
    for parameter in batch.model.get_decoder().layers[2].parameters():
        parameter.mul_(1.5)
    assert_close(compiled(**batch.inputs).logits[batch.mask], reference(batch, PRUNED)[batch.mask])
    batch.model.to(torch.bfloat16)
    inputs = {n: v.bfloat16() if v.is_floating_point() else v for n, v in batch.inputs.items()}
    assert compiled(**inputs).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("policy", [PRUNED, FROZEN], ids=["pruned", "frozen"])
def test_parameters_replaced_are_used(policy: Policy) -> None:
    """`load_state_dict(assign=True)` puts new parameters in place of old ones."""
    batch = own_batch()
    compiled = compile_eagerly(batch.model, policy)
    check(compiled, batch, policy)
    before = reference(batch, policy)
    batch.model.load_state_dict(FAMILIES["llava"].build(seed=7).state_dict(), assign=True)
    assert not torch.equal(reference(batch, policy), before)
    check(compiled, batch, policy)


# Precision, devices, training.


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "llama"])
@torch.no_grad()
def test_a_first_call_under_autocast(name: str) -> None:
    batch = own_batch(name)
    layers = batch.model.config.get_text_config().num_hidden_layers
    pruned_policy = Policy.depthwise(layers, mha_query_depth=1, mha_key_value_depth=3, mlp_depth=2)
    compiled = compile_eagerly(batch.model, {"100%": Policy.full(layers), "pruned": pruned_policy})
    plain = batch.model(**batch.inputs).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = compiled(**batch.inputs, **batch.call_arguments()).logits
        pruned = compiled(**batch.inputs, **batch.call_arguments(), tier="pruned").logits
        expected = batch.model(**batch.inputs).logits
    assert torch.equal(logits, expected)
    assert pruned.isfinite().all()
    assert torch.equal(batch.model(**batch.inputs).logits, plain)
    assert not torch.equal(expected, plain)


@torch.no_grad()
def test_another_default_device() -> None:
    batch = own_batch()
    expected = compile_eagerly(batch.model, PRUNED.replace(visual_tokens=2))(**batch.inputs).logits
    compiled = compile_eagerly(batch.model, PRUNED.replace(visual_tokens=2))
    masks = {name: value for name, value in batch.inputs.items() if name != "attention_mask"}
    shorter = compile_eagerly(batch.model, PRUNED)(**masks).logits
    with torch.device("meta"):
        assert torch.equal(compiled(**batch.inputs).logits, expected)
        assert torch.equal(compile_eagerly(batch.model, PRUNED)(**masks).logits, shorter)


@torch.no_grad()
def test_training_mode_is_one_for_both() -> None:
    batch = own_batch()
    compiled = compile_eagerly(batch.model, PRUNED)
    inner = compiled.get_decoder()
    assert compiled.train() is compiled
    assert all(module.training for module in (batch.model, batch.model.model, compiled))
    compiled(**batch.inputs)
    assert inner.training
    batch.model.eval()
    check(compiled, batch)
    assert not inner.training
    batch.model.train()
    assert compiled.eval() is compiled
    assert not any(module.training for module in (batch.model, batch.model.get_decoder(), compiled))


def test_gradient_checkpointing_in_training_is_refused() -> None:
    batch = own_batch()
    compiled = compile_eagerly(batch.model, PRUNED)
    batch.model.gradient_checkpointing_enable()
    with torch.no_grad():
        compiled(**batch.inputs)  # nothing is checkpointed in eval mode
    compiled.train()
    with pytest.raises(UnsupportedUsageError, match="gradient checkpointing"):
        compiled(**batch.inputs)
    batch.model.gradient_checkpointing_disable()
    compiled(**batch.inputs).logits.sum().backward()
    assert batch.model.lm_head.weight.grad is not None


@torch.no_grad()
def test_hooks_do_not_see_example_values() -> None:
    batch = own_batch()
    seen: list[torch.Tensor] = []
    for layer in batch.model.get_decoder().layers:
        layer.mlp.register_forward_hook(lambda _, args, output: seen.append(output))
        layer.input_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    compiled = compile_eagerly(batch.model, Policy.full(4))
    assert not seen
    expected = batch.model(**batch.inputs).logits
    untouched = [value.clone() for value in seen]
    seen.clear()
    assert torch.equal(compiled(**batch.inputs).logits, expected)
    assert all(torch.equal(a, b) for a, b in zip(seen, untouched, strict=True))


# Forwards replaced, parts called, copies.


def _replace(module: Any) -> None:
    module.forward = lambda *args, **kwargs: type(module).forward(module, *args, **kwargs)


@pytest.mark.parametrize("path", ["", "model", "model.language_model"])
def test_a_replaced_forward_is_refused(path: str) -> None:
    batch = own_batch()
    compiled = compile_eagerly(batch.model, PRUNED)
    module = batch.model.get_submodule(path)
    _replace(module)
    with pytest.raises(UnsupportedUsageError, match=rf"forward of {path or 'LlavaForConditionalGeneration'} was repl"):
        compiled(**batch.inputs)
    with pytest.raises(UnsupportedModelError, match="forward"):
        compile_eagerly(batch.model, PRUNED)
    del module.forward
    check(compiled, batch)


def test_a_replaced_forward_of_the_compiled_model_is_refused_by_generate() -> None:
    batch = own_batch()
    compiled = compile_eagerly(batch.model, PRUNED)
    _replace(compiled)
    with pytest.raises(UnsupportedUsageError, match="replaced by one that does not call it"):
        compiled.generate(**batch.inputs, max_new_tokens=2)


def test_an_outer_model_that_does_not_call_its_decoder_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = own_batch()
    compiled = compile_eagerly(batch.model, PRUNED)
    answer = batch.model(**batch.inputs)
    monkeypatch.setattr(type(batch.model), "forward", lambda self, input_ids=None, **kwargs: answer)
    with pytest.raises(UnsupportedModelError, match=r"does not call model\.language_model"):
        compiled(**batch.inputs)


@pytest.mark.parametrize("path", ["model", "model.language_model"])
def test_parts_of_a_compiled_model_do_not_run_unpruned(path: str) -> None:
    batch = own_batch()
    compiled = compile_eagerly(batch.model, PRUNED)
    for view in (compiled, compiled.tier("default")):
        with pytest.raises(UnsupportedUsageError, match=rf"{path} \(Ll.*call the compiled model"):
            view.get_submodule(path)(**batch.inputs)
    with torch.no_grad():
        compiled.get_submodule("lm_head")(torch.zeros(1, batch.model.lm_head.in_features))
    check(compiled, batch)
    batch.model.get_submodule(path)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, pickle.dumps, lambda m: torch.save(m, io.BytesIO())], ids=["copy", "pickle", "save"]
)
def test_copies_are_refused(duplicate: Callable[[Any], Any]) -> None:
    compiled = compile_eagerly(own_batch().model, PRUNED)
    with pytest.raises(TypeError, match=r"compiled model cannot be copied.*compile again"):
        duplicate(compiled)


def test_a_compiled_model_is_not_compiled_again() -> None:
    compiled = compile_eagerly(own_batch().model, PRUNED)
    with pytest.raises(TypeError, match="compiled model already"):
        dop_compile(compiled, PRUNED)


# Arguments.


@pytest.mark.parametrize("through_config", [False, True])
def test_prefill_in_chunks_is_refused(through_config: bool) -> None:
    batch = own_batch()
    compiled = compile_eagerly(batch.model, PRUNED)
    chunks: dict[str, Any] = {"prefill_chunk_size": 4}
    if through_config:
        chunks = {"generation_config": GenerationConfig(**chunks)}
    with pytest.raises(UnsupportedUsageError, match="prefill_chunk_size"):
        compiled.generate(**batch.inputs, **chunks, max_new_tokens=2)


@torch.no_grad()
def test_arguments_that_decoders_ignore() -> None:
    batch = own_batch()
    compiled = compile_eagerly(batch.model, PRUNED)
    expected = compiled(**batch.inputs).logits
    programs = len(compiled.dop.programs)
    for count in (3, 5, torch.tensor(7)):
        assert torch.equal(compiled(**batch.inputs, num_items_in_batch=count).logits, expected)
    assert len(compiled.dop.programs) == programs
    kinds = torch.zeros_like(batch.inputs["input_ids"])
    assert torch.equal(compiled(**batch.inputs, mm_token_type_ids=kinds).logits, expected)
    assert torch.equal(compiled(**batch.inputs, cache_position=torch.arange(kinds.shape[1])).logits, expected)


@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (3, 1, 3)], ids=repr)
def test_position_ids_of_another_length(shape: tuple[int, ...]) -> None:
    batch = own_batch()
    compiled = compile_eagerly(batch.model, PRUNED)
    with pytest.raises(ValueError, match=r"position_ids are .*the last two sizes must be"):
        compiled(**batch.inputs, position_ids=torch.zeros(shape, dtype=torch.long))
    with pytest.raises(ValueError, match="must be a tensor"):
        compiled(**batch.inputs, position_ids=[1, 2, 3])


def test_attention_mask_of_another_length() -> None:
    batch = own_batch()
    compiled = compile_eagerly(batch.model, PRUNED)
    inputs = {**batch.inputs, "attention_mask": batch.inputs["attention_mask"][:, 1:]}
    with pytest.raises(ValueError, match=r"attention_mask is .*must be"):
        compiled(**inputs)


# Fingerprints.


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "llama"])
def test_a_saved_model_keeps_its_fingerprint(name: str, tmp_path: Any) -> None:
    model = FAMILIES[name].build(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = [type(model).from_pretrained(tmp_path, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    assert len({model_fingerprint(m) for m in (model, *loaded)}) == 1
    assert model_fingerprint(FAMILIES[name].build(seed=1)) != model_fingerprint(model)
