"""Models whose modules are the user's: adapters, quantised and parametrized linears, hooks, offloading, dtypes."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration
from transformers.distributed import DistributedConfig
from transformers.integrations.peft import MIN_PEFT_VERSION

from dop_compile import Policy, dop_compile, from_pretrained, model_fingerprint
from dop_compile.errors import UnsupportedModelError, UnsupportedUsageError
from dop_compile.policy.provenance import Provenance
from tests.families import FAMILIES
from tests.search.worker import run_ranks
from tests.support import Batch, assert_close, assert_generates_reference, make_batch, reference

PRUNED = Policy.depthwise(4, mha_query_depth=1, mha_key_value_depth=3, mlp_depth=2)
FULL = Policy.full(4)
TIERS = {"100%": FULL, "pruned": PRUNED}
ROWS = [[("text", 9)], [("text", 3), ("image",), ("text", 4)]]


def own_batch(name: str = "llava") -> Batch:
    """A batch for a model that the test may change."""
    return make_batch(name, ROWS, model=FAMILIES[name].build())


@torch.no_grad()
def check(compiled: Any, batch: Batch, tolerance: float = 1e-5) -> Tensor:
    """What is pruned agrees with the oracle as the model is now, 100 % is the original bit for bit; its logits."""
    given = batch.call_arguments()
    original: Tensor = batch.model(**batch.inputs).logits
    assert torch.equal(compiled(**batch.inputs, **given, tier="100%").logits, original)
    logits = compiled(**batch.inputs, **given, tier="pruned").logits
    assert_close(logits[batch.mask], reference(batch, PRUNED)[batch.mask], tolerance)
    return original


def compile_eagerly(model: Any, policy: Any) -> Any:
    return dop_compile(model, policy, backend="eager")


def typed(batch: Batch, dtype: torch.dtype) -> Batch:
    return replace(batch, inputs={n: v.to(dtype) if v.is_floating_point() else v for n, v in batch.inputs.items()})


# LoRA.


def lora(**settings: Any) -> peft.LoraConfig:
    """Adapters that change the answer at once, on some projections of some layers."""
    targets = r".*language_model.layers.[123].*\.(q_proj|v_proj|o_proj|down_proj)"
    return peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **settings)


def test_lora_before_compiling() -> None:
    batch = own_batch()
    plain = check(compile_eagerly(batch.model, TIERS), batch)
    wrapped = peft.get_peft_model(batch.model, lora()).eval()
    compiled = compile_eagerly(wrapped.get_base_model(), TIERS)
    assert type(compiled) is type(batch.model)
    assert not torch.equal(check(compiled, batch), plain)
    assert_generates_reference(compiled.tier("pruned"), batch, PRUNED, tokens=2)


def test_a_peft_wrapper_is_refused() -> None:
    wrapped = peft.get_peft_model(own_batch().model, lora())
    with pytest.raises(TypeError, match=r"PeftModel is peft's wrapper.*pass model\.get_base_model\(\)"):
        dop_compile(wrapped, FULL)


@pytest.mark.conformance
@torch.no_grad()
def test_lora_switched_under_a_compiler() -> None:
    """No module comes or goes: only what torch.compile guards on tells that the adapters are off."""
    batch = own_batch()
    batch.model.add_adapter(lora())
    compiled = dop_compile(batch.model, PRUNED, backend=lambda graph, inputs: graph.forward)
    found = []
    for switch in (batch.model.enable_adapters, batch.model.disable_adapters):
        switch()
        found.append(compiled(**batch.inputs).logits)
        assert_close(found[-1][batch.mask], reference(batch, PRUNED)[batch.mask])
    assert not torch.equal(*found)


adds_adapters = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION), reason=f"transformers asks for peft {MIN_PEFT_VERSION}"
)


@adds_adapters
def test_lora_after_compiling() -> None:
    batch = own_batch()
    model = batch.model
    compiled = compile_eagerly(model, TIERS)
    plain = check(compiled, batch)
    model.add_adapter(lora(), "first")
    first = check(compiled, batch)
    model.disable_adapters()
    assert torch.equal(check(compiled, batch), plain)
    model.enable_adapters()
    assert torch.equal(check(compiled, batch), first)
    model.add_adapter(lora(use_dora=True), "second")
    model.set_adapter("second")
    second = check(compiled, batch)
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    for layer in layers:
        layer.merge()
    assert_close(check(compiled, batch), second, 1e-4)
    for layer in layers:
        layer.unmerge()
    model.delete_adapter("second")
    model.set_adapter("first")
    assert_close(check(compiled, batch), first, 1e-4)
    for first_logits, second_logits in ((plain, first), (first, second)):
        assert not torch.equal(first_logits, second_logits)


@adds_adapters
def test_lora_through_the_compiled_model() -> None:
    """The layers are shared: what is added to one is added to the other."""
    batch = own_batch()
    compiled = compile_eagerly(batch.model, TIERS)
    plain = check(compiled, batch)
    compiled.add_adapter(lora())
    assert not torch.equal(check(compiled, batch), plain)


def test_lora_is_trained() -> None:
    batch = own_batch()
    compiled = compile_eagerly(peft.get_peft_model(batch.model, lora()).get_base_model(), PRUNED)
    compiled(**batch.inputs).logits.logsumexp(-1)[batch.mask].sum().backward()
    graded = {name for name, parameter in batch.model.named_parameters() if parameter.grad is not None}
    assert graded
    assert all("lora_" in name for name in graded)


# Quantised linears.


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("config", "tolerance"),
    [
        (Int8WeightOnlyConfig(), 1e-5),
        (IntxWeightOnlyConfig(weight_dtype=torch.int4), 1e-5),
        # A rounding of an activation that falls on the other side is one step of 127
        (Int8DynamicActivationInt8WeightConfig(), 5e-2),
    ],
    ids=["int8 weights", "int4 weights", "int8 activations"],
)
def test_torchao(config: Any, tolerance: float, after: bool) -> None:
    batch = own_batch()
    with torch.no_grad():
        plain = batch.model(**batch.inputs).logits
    compiled = compile_eagerly(batch.model, TIERS) if after else None
    if compiled is not None:
        check(compiled, batch)
    quantize_(batch.model.get_decoder(), config)
    compiled = compiled or compile_eagerly(batch.model, TIERS)
    assert not torch.equal(check(compiled, batch, tolerance), plain)
    if tolerance == 1e-5:
        assert_generates_reference(compiled.tier("pruned"), batch, PRUNED, tokens=2)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes(bits: int, tmp_path: Path) -> None:
    batch = own_batch()
    batch.model.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path, quantization_config=config).eval()
    model.generation_config = batch.model.generation_config
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.inputs.items()}
    check(compile_eagerly(model, TIERS), replace(batch, model=model, inputs=inputs), 5e-2)


# Where the weights are, and in which precision.


def test_a_device_map_of_one_device(tmp_path: Path) -> None:
    batch = own_batch()
    batch.model.save_pretrained(tmp_path)
    for device_map in ({"": "cpu"}, "cpu"):
        model = LlavaForConditionalGeneration.from_pretrained(tmp_path, device_map=device_map).eval()
        check(compile_eagerly(model, TIERS), replace(batch, model=model))


def test_offloading_is_refused(tmp_path: Path) -> None:
    batch = own_batch()
    batch.model.save_pretrained(tmp_path / "model")
    parts = dict.fromkeys(("model.vision_tower", "model.multi_modal_projector", "lm_head"), "cpu")
    model = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=parts | {"model.language_model": "disk"}, offload_folder=tmp_path / "disk"
    )
    with pytest.raises(UnsupportedModelError, match=r"the model \(Llava.*hook of accelerate.*device_map={'': 0}"):
        dop_compile(model, FULL)
    compiled = compile_eagerly(batch.model, TIERS)
    check(compiled, batch)
    accelerate.cpu_offload(batch.model, execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedUsageError, match="forward of LlavaForConditionalGeneration was replaced"):
        compiled(**batch.inputs)


@pytest.mark.parametrize("path", ["", "layers.1", "layers.1.self_attn"])
def test_offloading_a_part_is_refused(path: str) -> None:
    batch = own_batch()
    part = batch.model.get_decoder().get_submodule(path)
    accelerate.cpu_offload(part, execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match=r"hook of accelerate|several devices \(cpu, meta\)"):
        dop_compile(batch.model, FULL)


def test_precision_changed_after_compiling() -> None:
    batch = own_batch()
    compiled = compile_eagerly(batch.model, TIERS)
    plain = check(compiled, batch)
    for move in (batch.model.double, compiled.double):
        move()
        assert_close(check(compiled, typed(batch, torch.float64)), plain)
    batch.model.float().bfloat16()
    check(compiled, typed(batch, torch.bfloat16), 5e-2)
    assert compiled.dtype == torch.bfloat16
    compiled.to(torch.float32)
    assert_close(check(compiled, batch), plain, 2e-2)


def test_weights_on_the_meta_device() -> None:
    batch = own_batch()
    compiled = compile_eagerly(batch.model, TIERS)
    batch.model.to("meta")
    for call in (compiled, compiled.tier("pruned"), compiled.generate):
        with pytest.raises(UnsupportedUsageError, match="on the meta device and hold no values"):
            call(**batch.inputs)


def test_inference_mode_and_gradients_in_turn() -> None:
    batch = own_batch()
    with torch.inference_mode():
        compiled = compile_eagerly(batch.model, TIERS)
        check(compiled, batch)
        compiled.generate(**batch.inputs, max_new_tokens=2)
    compiled(**batch.inputs, tier="pruned").logits.sum().backward()
    with torch.inference_mode():
        check(compiled, batch)
        assert_generates_reference(compiled.tier("pruned"), batch, PRUNED, tokens=2)


def generate_tensor_parallel(rank: int, world: int, folder: Path) -> None:
    """One of the processes that share the model saved in `folder`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        parallel = DistributedConfig(tp_plan="auto", tp_size=world)
        model = LlavaForConditionalGeneration.from_pretrained(folder / "model", distributed_config=parallel).eval()
        batch = own_batch()
        model.generation_config = batch.model.generation_config
        projection = model.get_decoder().layers[0].self_attn.q_proj.weight
        assert (
            projection.to_local().shape[0] == batch.model.get_decoder().layers[0].self_attn.q_proj.weight.shape[0] / 2
        )
        compiled = compile_eagerly(model, TIERS)
        with torch.no_grad():
            for tier, policy in TIERS.items():
                logits = compiled(**batch.inputs, tier=tier).logits
                assert_close(logits[batch.mask], reference(batch, policy)[batch.mask])
        assert_generates_reference(compiled.tier("pruned"), batch, PRUNED, tokens=2)
        made_for = PRUNED.replace(provenance=Provenance(model_fingerprint(model)))
        compile_eagerly(model, made_for).save_pretrained(folder / "saved")
    finally:
        dist.destroy_process_group()


def test_tensor_parallel_processes_generate_and_save(tmp_path: Path) -> None:
    batch = own_batch()
    batch.model.save_pretrained(tmp_path / "model")
    run_ranks(generate_tensor_parallel, 2, tmp_path)
    again = from_pretrained(tmp_path / "saved", backend="eager")
    with torch.no_grad():
        assert torch.equal(again(**batch.inputs).logits, compile_eagerly(batch.model, PRUNED)(**batch.inputs).logits)


# Parametrizations.


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


NORMS: dict[str, Callable[[nn.Module], Any]] = {
    "parametrize": lambda module: parametrize.register_parametrization(module, "weight", Doubled()),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm by hook": nn.utils.weight_norm,
    "spectral_norm by hook": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("kind", NORMS)
def test_parametrized_weights(kind: str) -> None:
    """Registered after compiling, trained, and compiled with."""
    torch.manual_seed(0)  # of the vectors by which a spectral norm is estimated: a bad draw magnifies rounding
    batch = own_batch()
    compiled = compile_eagerly(batch.model, TIERS)
    plain = check(compiled, batch)
    layer = batch.model.get_decoder().layers[1]
    for path in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"):
        NORMS[kind](layer.get_submodule(path))
    batch.model.eval()
    added = check(compiled, batch)
    with torch.no_grad():
        for parameter in layer.mlp.parameters():
            parameter.mul_(1 + torch.rand_like(parameter))
    changed = check(compiled, batch)
    assert torch.equal(check(compile_eagerly(batch.model, TIERS), batch), changed)
    assert not torch.equal(added, changed)
    if kind != "weight_norm by hook" and kind != "weight_norm":
        assert not torch.equal(plain, added)


def test_parametrized_weights_of_an_opened_module_are_refused() -> None:
    batch = make_batch("llama", model=FAMILIES["llama"].build())
    attention = batch.model.get_decoder().layers[1].self_attn
    attention.scale = nn.Parameter(torch.ones(1))
    parametrize.register_parametrization(attention, "scale", Doubled())
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.self_attn .*parametrized weights of its own"):
        compile_eagerly(batch.model, FULL)


# Hooks and training.


@pytest.mark.parametrize("path", ["", "layers.1", "layers.1.self_attn"])
@pytest.mark.parametrize("kind", ["pre", "backward", "backward_pre"])
def test_other_hooks_on_opened_modules_are_refused(path: str, kind: str) -> None:
    batch = own_batch()
    compiled = compile_eagerly(batch.model, TIERS)
    module = batch.model.get_decoder().get_submodule(path)
    add = {"pre": "register_forward_pre_hook", "backward": "register_full_backward_hook"}
    handle = getattr(module, add.get(kind, "register_full_backward_pre_hook"))(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match="hook"):
        compiled(**batch.inputs)
    with pytest.raises(UnsupportedModelError, match="hook"):
        compile_eagerly(batch.model, TIERS)
    handle.remove()
    check(compiled, batch)


@pytest.mark.parametrize("path", ["norm", "layers.1.mlp", "layers.0.input_layernorm", "layers.1.self_attn.o_proj"])
def test_hooks_of_all_kinds_on_modules_that_are_nodes(path: str) -> None:
    batch = own_batch()
    seen: list[str] = []
    module = batch.model.get_decoder().get_submodule(path)
    before = [module.register_forward_pre_hook(lambda _, args: (args[0] * 1.5, *args[1:]))]
    compiled = compile_eagerly(batch.model, TIERS)
    hooked = check(compiled, batch)
    module.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs), with_kwargs=True)
    module.register_forward_hook(lambda _, args, output: output + 1)
    module.register_full_backward_hook(lambda *_: seen.append("backward"))
    module.register_full_backward_pre_hook(lambda *_: seen.append("before"))
    assert not torch.equal(check(compiled, batch), hooked)
    compiled(**batch.inputs, tier="pruned").logits[batch.mask].sum().backward()
    # The final norm is also that of tokens which take part in nothing
    assert seen == ["before", "backward"] * (1 + (path == "norm"))
    before[0].remove()
    check(compiled, batch)


def test_dropout_is_drawn_as_by_the_original() -> None:
    batch = own_batch()
    compiled = compile_eagerly(batch.model, TIERS)
    for layer in batch.model.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.5
        layer.mlp = nn.Sequential(layer.mlp, nn.Dropout(0.5)).eval()

    def logits(model: Any, seed: int) -> Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            result: Tensor = model(**batch.inputs).logits
        return result

    plain = check(compiled, batch)
    compiled.train()
    for seed in range(2):
        assert torch.equal(logits(compiled, seed), logits(batch.model, seed))
    assert not torch.equal(logits(compiled, 0), logits(compiled, 1))
    compiled.eval()
    assert torch.equal(logits(compiled, 0), plain)
    batch.model.get_decoder().layers[2].self_attn.train()
    assert torch.equal(logits(compiled, 0), logits(batch.model, 0))
    assert not torch.equal(logits(compiled, 0), plain)
