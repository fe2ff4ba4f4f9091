"""What is saved of a compiled model is read back with the same numbers, or refused with nothing left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import LlavaForConditionalGeneration, TorchAoConfig

from dop_compile import Policy, dop_compile, from_pretrained, model_fingerprint, save_policies
from dop_compile.errors import UnsupportedUsageError
from dop_compile.policy.provenance import Provenance
from tests.families import FAMILIES
from tests.support import Batch, make_batch

PRUNED = Policy.depthwise(4, mha_query_depth=1, mha_key_value_depth=3, mlp_depth=2)
ADAPTED = r".*language_model.layers.[123].*\.(q_proj|v_proj|o_proj|down_proj)"


def own_batch() -> Batch:
    return make_batch("llava", [[("text", 3), ("image",), ("text", 4)]], model=FAMILIES["llava"].build())


def lora(**settings: Any) -> peft.LoraConfig:
    """Adapters that change the answer at once."""
    return peft.LoraConfig(r=4, **{"target_modules": ADAPTED, "init_lora_weights": False, **settings})


def compiled_for(model: Any) -> Any:
    """Compiled with a policy that names the model as it is."""
    made_for = Provenance(model_fingerprint(model))
    return dop_compile(model, PRUNED.replace(provenance=made_for), backend="eager")


@torch.no_grad()
def logits(model: Any, batch: Batch) -> Tensor:
    found: Tensor = model(**batch.inputs).logits
    return found


def check_comes_back(compiled: Any, batch: Batch, folder: Path, **settings: Any) -> None:
    """The model of `batch` is what transformers reads, and the one that the policies name."""
    compiled.save_pretrained(folder, **settings)
    again = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    assert torch.equal(logits(again, batch), logits(batch.model, batch))
    if (made_for := compiled.dop.tiers["default"].provenance) is not None:
        assert model_fingerprint(again) == made_for.model_fingerprint


def check_refused(compiled: Any, folder: Path, message: str, **settings: Any) -> None:
    with pytest.raises(UnsupportedUsageError, match=message):
        compiled.save_pretrained(folder / "new", **settings)
    assert not list(folder.iterdir())


# Adapters.


def several(model: Any) -> None:
    for name in ("a", "b"):
        model.add_adapter(lora(), name)
    model.set_adapter("a")


ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "add_adapter": lambda model: model.add_adapter(lora(), "first"),
    "get_base_model": lambda model: peft.get_peft_model(model, lora()).get_base_model(),
    "the active one": several,
    "taken from weights": lambda model: model.add_adapter(lora(init_lora_weights="pissa")),
    "whole layers": lambda m: peft.get_peft_model(m, lora(modules_to_save=["lm_head"])).get_base_model(),
    "tokens": lambda m: peft.get_peft_model(m, lora(trainable_token_indices={"embed_tokens": [1]})).get_base_model(),
    "biases": lambda model: peft.get_peft_model(model, lora(bias="all")).get_base_model(),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_comes_back(kind: str, tmp_path: Path) -> None:
    batch = own_batch()
    plain = logits(batch.model, batch)
    model = ADAPTERS[kind](batch.model) or batch.model
    if kind == "tokens":
        for name, weight in model.named_parameters():
            if "trainable_tokens_delta" in name:
                weight.data += 1
    adapted = logits(model, batch)
    assert not torch.allclose(adapted, plain)
    compiled = compiled_for(model)
    check_comes_back(compiled, replace(batch, model=model), tmp_path)
    assert torch.equal(logits(model, batch), adapted), "saving changes nothing"
    if kind == "add_adapter":
        assert torch.equal(logits(from_pretrained(tmp_path, backend="eager"), batch), logits(compiled, batch))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "adapter").mkdir(exist_ok=True)
        shutil.move(tmp_path / name, tmp_path / "adapter" / name)
    if kind != "taken from weights":  # what peft makes of it
        base = LlavaForConditionalGeneration.from_pretrained(tmp_path)
        assert torch.equal(logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval(), batch), adapted)


@pytest.mark.parametrize("through", ["original", "compiled"])
def test_an_adapter_added_after_compiling(through: str, tmp_path: Path) -> None:
    batch = own_batch()
    compiled = dop_compile(batch.model, PRUNED, backend="eager")
    (batch.model if through == "original" else compiled).add_adapter(lora())
    check_comes_back(compiled, batch, tmp_path)


def merged(model: Any) -> Any:
    wrapped = peft.get_peft_model(model, lora())
    wrapped.merge_adapter()
    return wrapped.get_base_model()


def scaled(model: Any) -> None:
    model.add_adapter(lora())
    model.get_decoder().layers[1].self_attn.q_proj.set_scale("default", 0.5)


def both(model: Any) -> None:
    several(model)
    model.set_adapter(["a", "b"])


def off(model: Any) -> None:
    model.add_adapter(lora())
    model.disable_adapters()


def in_a_part(model: Any) -> None:
    peft.inject_adapter_in_model(lora(target_modules=["q_proj"]), model.get_decoder())


REFUSED_ADAPTERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "merged": (merged, r"merged into the weights.*merge_and_unload"),
    "off": (off, r"switched off.*enable_adapters\(\) or delete_adapter"),
    "both": (both, r"2 adapters are active at once \(a, b\).*set_adapter"),
    "in a part": (in_a_part, "put into a part of the model.*add_adapter"),
    "scaled": (scaled, r"layers\.1\.self_attn\.q_proj scales it by .* in place of .*merge_and_unload"),
    # transformers looks for its magnitudes under other names than peft saves them
    "dora": (lambda model: model.add_adapter(lora(use_dora=True)), "lora_magnitude_vector.* is missing"),
}


@pytest.mark.parametrize("kind", REFUSED_ADAPTERS)
def test_adapters_that_would_come_back_as_others_are_refused(kind: str, tmp_path: Path) -> None:
    batch = own_batch()
    change, message = REFUSED_ADAPTERS[kind]
    model = change(batch.model) or batch.model
    check_refused(dop_compile(model, PRUNED, backend="eager"), tmp_path, message)


def test_an_adapter_that_was_taken_out_or_in_for_good(tmp_path: Path) -> None:
    batch = own_batch()
    batch.model.add_adapter(lora())
    batch.model.delete_adapter("default")
    check_comes_back(compiled_for(batch.model), batch, tmp_path / "out")
    model = peft.get_peft_model(batch.model, lora()).merge_and_unload()
    check_comes_back(compiled_for(model), replace(batch, model=model), tmp_path / "in")
    for name in ("out", "in"):
        assert not list((tmp_path / name).glob("adapter*"))


def test_a_folder_of_an_adapter_alone(tmp_path: Path) -> None:
    """As transformers saves it, with the model that it names."""
    own_batch().model.save_pretrained(tmp_path / "model")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    model.add_adapter(lora())
    batch = make_batch("llava", [[("text", 3), ("image",), ("text", 4)]], model=model)
    compiled = compiled_for(model)
    model.save_pretrained(tmp_path / "adapter")
    save_policies(compiled.dop.tiers, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    again = from_pretrained(tmp_path / "adapter", backend="eager")
    assert torch.equal(logits(again, batch), logits(compiled, batch))


def test_pushing_an_adapter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: pytest.fail("pushed"))
    batch = own_batch()
    batch.model.add_adapter(lora())
    with pytest.raises(UnsupportedUsageError, match=r"takes the adapter alone.*push_policies"):
        dop_compile(batch.model, PRUNED, backend="eager").push_to_hub("me/model")


# Files that were there before.


def test_nothing_of_a_former_save_is_read_with_a_new_one(tmp_path: Path) -> None:
    adapted, plain = own_batch(), own_batch()
    adapted.model.add_adapter(lora())
    check_comes_back(compiled_for(adapted.model), adapted, tmp_path)
    plain.model.lm_head.weight.data += 1
    check_comes_back(compiled_for(plain.model), plain, tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    (tmp_path / "notes.txt").write_text("mine")
    plain.model.lm_head.weight.data += 1
    check_comes_back(compiled_for(plain.model), plain, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "dop_compile.json",
        "notes.txt",
    }


def test_a_former_save_stays_where_a_new_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = own_batch()
    compiled = compiled_for(batch.model)
    compiled.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    for module in ("transformers.modeling_utils.safe_save_file", "dop_compile.drop_in.saving.save_policies"):
        with monkeypatch.context() as patched:
            patched.setattr(module, full)
            with pytest.raises(OSError, match="no space left"):
                compiled.save_pretrained(tmp_path)
            with pytest.raises(OSError, match="no space left"):
                compiled.save_pretrained(tmp_path / "new" / "one")
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
        assert not (tmp_path / "new" / "one").exists()


# Other weights and modules.


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def of_another_class(model: Any) -> None:
    own = model.lm_head
    model.lm_head = Doubled(own.in_features, own.out_features, bias=False)
    model.lm_head.weight = own.weight


def inserted(model: Any) -> None:
    layer = model.get_decoder().layers[1]
    layer.mlp = nn.Sequential(layer.mlp, nn.Dropout())


def widened(model: Any) -> None:
    model.lm_head = nn.Linear(model.lm_head.in_features, model.lm_head.out_features + 1, bias=False)


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "torchao": (
        lambda model: quantize_(model.get_decoder(), Int8WeightOnlyConfig()),
        r"q_proj\.weight is a Int8Tensor.*quantization_config",
    ),
    "parametrized": (
        lambda model: parametrizations.weight_norm(model.get_decoder().layers[1].mlp.up_proj),
        r"up_proj is a ParametrizedLinear and not a Linear, .*up_proj\.weight is missing.*save_policies",
    ),
    "of another class": (of_another_class, "lm_head is a Doubled and not a Linear"),
    "inserted": (inserted, r"layers\.1\.mlp is a Sequential and not a LlamaMLP"),
    "of another shape": (widened, r"lm_head\.weight is \(\d+, 64\) and not"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_modules_and_weights_that_the_class_does_not_have(kind: str, tmp_path: Path) -> None:
    batch = own_batch()
    change, message = REFUSED[kind]
    change(batch.model)
    check_refused(dop_compile(batch.model, PRUNED, backend="eager"), tmp_path, message)


def test_a_model_that_transformers_quantised(tmp_path: Path) -> None:
    own_batch().model.save_pretrained(tmp_path / "plain")
    config = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "plain", quantization_config=config).eval()
    batch = replace(own_batch(), model=model)
    check_comes_back(compiled_for(model), batch, tmp_path / "quantised")
    model.add_adapter(lora())
    check_comes_back(compiled_for(model), batch, tmp_path / "adapted")


def test_weights_that_are_given(tmp_path: Path) -> None:
    batch = own_batch()
    given = {name: value + 1 for name, value in batch.model.state_dict().items()}
    compiled = dop_compile(batch.model, PRUNED, backend="eager")
    compiled.save_pretrained(tmp_path / "other", state_dict=given)
    read = LlavaForConditionalGeneration.from_pretrained(tmp_path / "other")
    assert torch.equal(read.lm_head.weight, given["lm_head.weight"])
    named = compiled_for(batch.model)
    check_comes_back(named, batch, tmp_path / "same", state_dict=batch.model.state_dict())
    (tmp_path / "empty").mkdir()
    check_refused(named, tmp_path / "empty", "made for the model with fingerprint", state_dict=given)
    part = {name: value for name, value in given.items() if "norm" not in name}
    check_refused(compiled, tmp_path / "empty", r"norm\.weight is missing", state_dict=part)
    moved = {f"module.{name}": value for name, value in given.items()}
    check_refused(compiled, tmp_path / "empty", r"is missing.*and \d+ more", state_dict=moved)
    batch.model.add_adapter(lora())
    adapted = compiled_for(batch.model)
    check_comes_back(adapted, batch, tmp_path / "adapted", state_dict=batch.model.state_dict())
    batch.model.add_adapter(lora(), "second")
    batch.model.set_adapter("default")
    check_comes_back(adapted, batch, tmp_path / "one of two", state_dict=batch.model.state_dict())
    base = {name: value for name, value in batch.model.state_dict().items() if "lora_" not in name}
    unnamed = dop_compile(batch.model, PRUNED, backend="eager")
    check_refused(unnamed, tmp_path / "empty", "not among those given", state_dict=base)
    small = {"max_shard_size": "3KB"}
    check_refused(adapted, tmp_path / "empty", "take more than one file", **small)


def test_checkpoints_to_train_from_are_refused(tmp_path: Path) -> None:
    compiled = dop_compile(own_batch().model, PRUNED, backend="eager")
    check_refused(compiled, tmp_path, "from_pretrained does not read them", distributed_checkpoint=True)
    check_refused(compiled, tmp_path, "call push_to_hub of the compiled model", push_to_hub=True)


def test_a_policy_made_for_the_weights_before_they_were_trained(tmp_path: Path) -> None:
    batch = own_batch()
    before = model_fingerprint(batch.model)
    compiled = compiled_for(batch.model)
    batch.model.lm_head.weight.data += 1
    after = model_fingerprint(batch.model)
    check_refused(compiled, tmp_path, rf"{before[:12]}.*{after[:12]}.*Search a policy.*replace\(provenance=None\)")
    policy = compiled.dop.tiers["default"].replace(provenance=None)
    check_comes_back(dop_compile(batch.model, policy, backend="eager"), batch, tmp_path)
