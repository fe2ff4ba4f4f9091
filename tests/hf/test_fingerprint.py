"""What identifies a model: weights of every kind, adapters, and what does not count."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DeviceMesh, DTensor, Shard
from torch.nn.utils import parametrizations
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)

from dop_compile import Policy, dop_compile, model_fingerprint
from dop_compile.policy.provenance import Provenance
from dop_compile.search import measure_divergences, optimize
from dop_compile.search.axes import DOP_AXES
from tests.families import FAMILIES
from tests.support import make_batch


def llama() -> Any:
    return FAMILIES["llama"].build()


def by_definition(model: Any) -> str:
    """Configuration and sampled values in float32, of plain weights."""
    config = model.config.to_dict()
    for name in ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures"):
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        values = tensor.double().numpy().reshape(-1)
        digest.update(values[:: -(-values.size // 4096)].astype(np.float32).tobytes())
    return digest.hexdigest()


def test_plain_weights_as_ever() -> None:
    model = llama()
    assert model_fingerprint(model) == by_definition(model)
    linear = model.get_decoder().layers[0].self_attn.q_proj
    linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())
    assert not linear.weight.is_contiguous()
    assert model_fingerprint(model) == by_definition(model)
    with torch.no_grad():
        linear.weight[0, 0] += 1
    assert model_fingerprint(model) == by_definition(model)


class Opaque(Tensor):
    """A weight of a class of its own around real values, as those of bitsandbytes; it refuses to be reshaped."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.view, Tensor.reshape, Tensor.__getitem__):
            raise NotImplementedError
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_weights_that_are_shared_by_processes_count_as_whole(mesh: DeviceMesh) -> None:
    model = llama()
    plain = model_fingerprint(model)
    linear = model.get_decoder().layers[0].mlp.up_proj
    linear.weight = nn.Parameter(torch.distributed.tensor.distribute_tensor(linear.weight.detach(), mesh, [Shard(0)]))
    assert isinstance(linear.weight, DTensor)
    assert model_fingerprint(model) == plain


class Composed(Tensor):
    """A weight that does not say what it consists of, and does nothing else."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Composed:
        made: Composed = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError


SEEN = torch.arange(1.0, 9).view(2, 4)

KINDS: dict[str, Callable[[Tensor], Any]] = {
    "subclass": lambda x: x.as_subclass(Opaque),
    "complex": lambda x: torch.complex(torch.ones_like(x), x),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "float4": lambda x: x.to(torch.uint8).view(torch.float4_e2m1fn_x2),
    "int4": lambda x: x.to(torch.uint8).view(torch.int4),
    "sparse": Tensor.to_sparse,
    "csr": Tensor.to_sparse_csr,
    "mkldnn": Tensor.to_mkldnn,
    "jagged": lambda x: torch.nested.nested_tensor([x[0], x[1, :2]], layout=torch.jagged),
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[1, :2]]),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "one value": lambda x: x.sum(),
    "pieces": lambda x: (x, {"more": x}, "text"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_every_kind(kind: str) -> None:
    model = llama()

    def found(values: Tensor) -> str:
        return model_fingerprint(model, {"weight": KINDS[kind](values)})

    assert found(SEEN) == found(SEEN.clone())
    assert found(SEEN) != found(SEEN + 1)


def test_tensors_without_values_count_by_shape() -> None:
    model = llama()
    with FakeTensorMode():
        fake = torch.ones(2, 4)
    meta = torch.ones(2, 4, device="meta")
    assert model_fingerprint(model, {"weight": fake}) == model_fingerprint(model, {"weight": meta})
    assert model_fingerprint(model, {"weight": meta}) != model_fingerprint(model, {"weight": meta.T})
    assert model_fingerprint(model, {"weight": Composed(SEEN)}) != model_fingerprint(model, {"weight": meta})
    model_fingerprint(model, {"weight": nn.UninitializedParameter(), "state": object()})


@pytest.mark.parametrize(
    "config",
    [Int8WeightOnlyConfig(), IntxWeightOnlyConfig(weight_dtype=torch.int4), Int8DynamicActivationInt8WeightConfig()],
    ids=["int8 weights", "int4 weights", "int8 activations"],
)
def test_a_quantised_model_is_another(config: Any) -> None:
    names = []
    for change in (0.0, 0.0, 1.0):
        model = llama()
        names.append({model_fingerprint(model)})
        with torch.no_grad():
            model.get_decoder().layers[0].mlp.up_proj.weight += change
        quantize_(model.get_decoder(), config)
        names[-1].add(model_fingerprint(model))
    assert len(names[0]) == 2
    assert names[0] == names[1]
    assert names[0] != names[2]


def test_ways_to_quantise_are_told_apart() -> None:
    """Both hold the same integers, but one rounds activations too."""
    names = set()
    for config in (Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()):
        model = llama()
        quantize_(model.get_decoder(), config)
        names.add(model_fingerprint(model))
    assert len(names) == 2


def test_a_policy_and_a_search_of_a_quantised_model() -> None:
    """Curves and policies are made on it; those of the model it was made of are refused by name."""
    batch = make_batch("llava", [[("text", 3), ("image",), ("text", 4)]], model=FAMILIES["llava"].build())

    def searched() -> Policy:
        found = measure_divergences(batch.model, [batch.inputs], axes=DOP_AXES, points={"mha_depth": [2]})
        return optimize(found, 0.5, space="dop", alpha=None)

    floats = searched()
    quantize_(batch.model.get_decoder(), Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"made for another model \(fingerprint .*replace\(provenance=None\)"):
        dop_compile(batch.model, floats, backend="eager")
    dop_compile(batch.model, floats.replace(provenance=None), backend="eager")
    with torch.no_grad():
        assert dop_compile(batch.model, searched(), backend="eager")(**batch.inputs).logits.isfinite().all()


def test_parametrized_weights_count() -> None:
    model = llama()
    plain = model_fingerprint(model)
    parametrizations.weight_norm(model.get_decoder().layers[1].mlp.up_proj)
    assert model_fingerprint(model) != plain


def lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **settings)


def test_adapters_count_where_they_are_active_whatever_they_are_called() -> None:
    model, other = llama(), llama()
    plain = model_fingerprint(model)
    torch.manual_seed(0)
    model.add_adapter(lora(modules_to_save=["lm_head"]), "first")
    adapted = model_fingerprint(model)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(other, lora(modules_to_save=["lm_head"]), "other").get_base_model()
    assert model_fingerprint(wrapped) == adapted != plain
    model.add_adapter(lora(modules_to_save=["lm_head"]), "second")
    model.set_adapter("first")
    assert model_fingerprint(model) == adapted
    model.set_adapter("second")
    assert model_fingerprint(model) not in (adapted, plain)
    model.disable_adapters()
    assert model_fingerprint(model) == plain, "it computes what the model without adapters does"


def test_merged_adapters_count_as_the_weights_that_hold_them() -> None:
    wrapped = peft.get_peft_model(llama(), lora())
    wrapped.merge_adapter()
    merged = model_fingerprint(wrapped.get_base_model())
    assert model_fingerprint(wrapped.unload()) == merged != model_fingerprint(llama())


def test_a_provenance_of_a_model_with_adapters() -> None:
    model = llama()
    policy = Policy.full(4).replace(provenance=Provenance(model_fingerprint(model)))
    dop_compile(model, policy, backend="eager")
    model.add_adapter(lora())
    with pytest.raises(ValueError, match="made for another model"):
        dop_compile(model, policy, backend="eager")
    model.disable_adapters()
    dop_compile(model, policy, backend="eager")
