"""Adapters of peft on a model's layers: which count, and the model without them.

peft itself is not imported: its layers are told by what they have, since a model may hold them without `peft_config`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

__all__ = [
    "active_adapters",
    "adapter_layers",
    "available_adapters",
    "configurations",
    "effective_names",
    "without_adapters",
]

_WRAPPED = ("base_layer", "original_module", "token_adapter")
"""Where layers with adapters, layers trained whole (`modules_to_save`) and embeddings of which some rows are trained
keep what they stand for."""


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of peft, by path; an outer one comes before those inside it."""
    for path, module in model.named_modules():
        if hasattr(type(module), "enable_adapters") and any(name in module._modules for name in _WRAPPED):
            yield path, module


def active_adapters(layer: Any) -> tuple[str, ...]:
    """Names of the adapters that a layer adds to what its own weights give: none where they are off or merged."""
    if layer.disable_adapters or getattr(layer, "merged", False):
        return ()
    return tuple(name for name in layer.active_adapters if name in available_adapters(layer))


def configurations(model: nn.Module) -> dict[str, Any]:
    """peft's configurations by adapter name, of the model and of parts that adapters were injected into alone."""
    found: dict[str, Any] = {}
    for module in model.modules():
        found.update(vars(module).get("peft_config") or {})
    return found


def effective_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """What entries of a state dict are called whatever adapters are called; those that count for nothing are left out.

    A wrapped layer's weights have the names that they have without a wrapper. Weights of active adapters lose the
    adapter's name. Adapters that are loaded and not active, switched off or merged count for nothing.
    """
    layers = dict(adapter_layers(model))
    known = {name for layer in layers.values() for name in available_adapters(layer)}
    found = {}
    for name in names:
        parts: list[str] | None = name.split(".")
        for depth in range(name.count("."), -1, -1):  # from the inside, so that outer parts still are the paths
            if parts is not None and (layer := layers.get(".".join(parts[:depth]))) is not None:
                rest = _rest_in(layer, parts[depth:], known)
                parts = None if rest is None else parts[:depth] + rest
        if parts is not None:
            found[name] = ".".join(parts)
    return found


def available_adapters(layer: Any) -> set[str]:
    """Names of the adapters that a layer has weights of."""
    return set(layer._get_available_adapters())


def _rest_in(layer: Any, rest: list[str], known: set[str]) -> list[str] | None:
    if rest[0] in _WRAPPED:
        return rest[1:]
    if len(rest) > 1 and rest[1] in known:
        return rest[:1] + rest[2:] if rest[1] in active_adapters(layer) else None
    return rest


def without_adapters(module: nn.Module) -> nn.Module:
    """The model as it is without adapters: wrapped layers stand for their wrappers, in shallow copies around them.

    Weights are shared; merged weights stay merged. A module without adapters inside is returned as it is.
    """
    for name in _WRAPPED:
        if hasattr(type(module), "enable_adapters") and (own := module._modules.get(name)) is not None:
            return without_adapters(own)
    children = {name: child and without_adapters(child) for name, child in module._modules.items()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    copy: nn.Module = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    copy.__dict__["_modules"] = children
    return copy
