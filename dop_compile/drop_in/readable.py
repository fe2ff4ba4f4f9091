"""Whether transformers reads back the model that is saved: its classes, its weights, its adapter.

What is compared with is a model of the same class and configuration without values.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import initialization

from dop_compile.errors import UnsupportedUsageError
from dop_compile.hf.adapters import active_adapters, adapter_layers, available_adapters, configurations
from dop_compile.hf.names import ADAPTER_WEIGHTS

__all__ = ["check_adapter_file", "check_structure", "check_values", "saved_adapter"]

MERGE = "merge it first (merge_and_unload of peft's model)"
SHOWN = 4


def saved_adapter(view: nn.Module, original: nn.Module) -> tuple[str, Any] | None:
    """The active adapter's name, and a shallow copy of a compiled model which transformers saves as it; None without.

    The layers are shared by a compiled model and its original, and peft's configurations are where they were added.

    Raises:
        UnsupportedUsageError: a model with its adapters as they are now cannot be read back by transformers.
    """
    layers = [layer for _, layer in adapter_layers(view) if available_adapters(layer)]
    if any(getattr(layer, "merged", False) for layer in layers):
        raise UnsupportedUsageError(
            "an adapter is merged into the weights and would be added to them again; take it out before saving "
            "(unmerge_adapter), or for good (merge_and_unload)"
        )
    if any(layer.disable_adapters for layer in layers):
        raise UnsupportedUsageError(
            "the model's adapters are switched off, and would be on when it is read back; call enable_adapters() or "
            "delete_adapter(name) before saving"
        )
    active = {name for layer in layers for name in active_adapters(layer)}
    if len(active) > 1:
        raise UnsupportedUsageError(
            f"{len(active)} adapters are active at once ({', '.join(sorted(active))}), and transformers saves and "
            "reads one; choose it by set_adapter(name), or merge them first (merge_and_unload of peft's model)"
        )
    if not active:
        return None
    (name,) = active
    configs = {**(vars(original).get("peft_config") or {}), **(vars(view).get("peft_config") or {})}
    if name not in configs:
        where = "a part of the model" if name in configurations(view) else "the model without a peft_config"
        raise UnsupportedUsageError(
            f"adapter {name!r} was put into {where}, and transformers adds adapters to models alone; use add_adapter, "
            f"or {MERGE}"
        )
    adapter = copy.copy(configs[name])
    if isinstance(getattr(adapter, "init_lora_weights", None), str):
        # Such a beginning takes its part out of the weights, which are saved as they are now
        adapter.init_lora_weights = True
        adapter.base_model_name_or_path = None
    found = object.__new__(type(view))
    found.__dict__.update(view.__dict__)
    found.__dict__.update(peft_config={**configs, name: adapter}, _hf_peft_config_loaded=True)
    return name, found


def check_values(base: Any, weights: Mapping[str, Any]) -> None:
    """UnsupportedUsageError for weights that are no plain numbers, or are not there."""
    if getattr(base, "hf_quantizer", None) is not None:  # transformers says what it can write
        return
    shared = getattr(base.config, "distributed_config", None) is not None
    for name, value in weights.items():
        if not isinstance(value, Tensor) or (isinstance(value, DTensor) and shared):
            continue
        if value.device.type == "meta":
            raise UnsupportedUsageError(f"{name} is on the meta device and holds no values; load the model first")
        if is_traceable_wrapper_subclass(value) or value.is_quantized or value.layout is not torch.strided:
            kind = type(value).__name__ if type(value) not in (Tensor, nn.Parameter) else str(value.dtype)
            raise UnsupportedUsageError(
                f"{name} is a {kind}, which transformers cannot save in this model; load the model with a "
                "quantization_config or by tp_plan, or save it before its weights are quantised or distributed, and "
                "the tiers by save_policies"
            )


def check_structure(base: Any, weights: Mapping[str, Any], *, complete: bool) -> None:
    """Compare modules and names of weights with those of a new model of the class and configuration.

    Args:
        base: the model, without adapters.
        weights: what is to be saved of it.
        complete: whether tied weights are among them under all of their names.

    Raises:
        UnsupportedUsageError: reading it back would miss, make up or drop something; the message says what.
    """
    if getattr(base, "hf_quantizer", None) is not None:
        return
    new = _without_values(base)
    kinds = {path: type(module).__name__ for path, module in base.named_modules()}
    expected = {path: type(module) for path, module in new.named_modules()}
    wrong = [
        f"{path or 'the model'} is a {kinds[path]} and not a {kind.__name__}" if path in kinds else f"{path} is missing"
        for path, kind in expected.items()
        if path not in kinds or type(base.get_submodule(path)) is not kind
    ]
    shapes = {name: tuple(value.shape) for name, value in new.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    missing = (name for name in shapes if name not in found)
    wrong += [f"{name} is missing" for name in missing if complete or not _is_optional(new, name)]
    wrong += [f"{name} has no place" for name in found if name not in shapes]
    wrong += [
        f"{name} is {found[name]} and not {shapes[name]}"
        for name in found
        if name in shapes and found[name] != shapes[name]
    ]
    if wrong:
        raise UnsupportedUsageError(
            f"transformers would read back another model than this: {_shown(wrong)}; put the class's own modules and "
            "names back, or save the original model in a way of your own, and the tiers by save_policies"
        )


def check_adapter_file(adapter: Any, name: str, folder: Path) -> None:
    """UnsupportedUsageError if transformers does not read from a folder the adapter that a model has."""
    if not (folder / ADAPTER_WEIGHTS).exists():
        raise UnsupportedUsageError(
            f"adapter {name!r}: its weights are not among those given, or take more than one file; give all weights of "
            "the model, or a larger max_shard_size"
        )
    new = _without_values(adapter)
    info = new.load_adapter(str(folder))
    wrong = [f"{key} is missing" for key in sorted(info.missing_keys)]
    wrong += [f"{key} has no place" for key in sorted(info.unexpected_keys)]
    wrong += [f"{key} has another shape" for key in sorted(map(str, info.mismatched_keys))]
    scales = {path: getattr(layer, "scaling", {}).get(name) for path, layer in adapter_layers(adapter)}
    read = {path: getattr(layer, "scaling", {}).get("default") for path, layer in adapter_layers(new)}
    wrong += [
        f"{path} scales it by {scales.get(path)} in place of {read.get(path)}"
        for path in dict.fromkeys([*scales, *read])
        if scales.get(path) != read.get(path)
    ]
    if wrong:
        raise UnsupportedUsageError(
            f"adapter {name!r} would be read back as another by transformers: {_shown(wrong)}; {MERGE}, or save the "
            "adapter with peft, the model before it was added, and the tiers by save_policies"
        )


def _without_values(model: Any) -> Any:
    with torch.device("meta"), initialization.no_init_weights():
        return type(model)._from_config(copy.deepcopy(model.config))


def _is_optional(new: Any, name: str) -> bool:
    """Whether reading a model fills in a weight: one that is tied to another, or that is made anew."""
    ignored: Iterable[str] = (*(new._keys_to_ignore_on_save or ()), *(new._keys_to_ignore_on_load_missing or ()))
    tied = {**new.all_tied_weights_keys, **{v: k for k, v in new.all_tied_weights_keys.items()}}
    return name in tied or any(re.search(pattern, name) for pattern in ignored)


def _shown(wrong: list[str]) -> str:
    more = f", and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    return ", ".join(wrong[:SHOWN]) + more
