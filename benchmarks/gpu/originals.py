"""What users get from torch.compile without pruning, and CUDA graphs: compiled originals and static caches.

All of this compiles whole decoders, for tens of seconds each, so it is measured last and as far as time allows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from dop_compile import dop_compile
from gpu.decoding import LLAVA, STEPS
from gpu.setting import Decoder, Setting, geometry
from gpu.timing import ORIGINAL, measure, per_token

__all__ = ["originals"]

PART = "torch.compile"
PRUNED = "28%"


def originals(setting: Setting) -> None:
    """LLaVA-1.5 at batch 1: each layer compiled, tokens from static caches, the whole decoder compiled."""
    decoder = Decoder(setting, geometry(setting, LLAVA))
    model, device = decoder.model, setting.device
    pruned = dop_compile(model, {PRUNED: decoder.policies[PRUNED]}, backend=setting.compiler)
    calls: dict[str, Callable[..., Any]] = {
        ORIGINAL: decoder.prefill(model, 1),
        "original, each layer compiled": decoder.prefill(_layers_compiled(model, setting.compiler), 1),
        f"{PRUNED} compiled": decoder.prefill(pruned, 1, PRUNED),
    }
    print(f"{PART}, prefill", flush=True)
    setting.store.add(PART, "prefill", measure(calls, setting.rounds, device, setting.clock))

    static = {"cache_implementation": "static"}
    generations: dict[str, Callable[..., Any]] = {
        ORIGINAL: decoder.generate(model, 1),
        f"{PRUNED} compiled": decoder.generate(pruned, 1, PRUNED),
        "original, static cache": decoder.generate(model, 1, **static),
        f"{PRUNED}, static cache": decoder.generate(pruned, 1, PRUNED, **static),
    }
    print(f"{PART}, token", flush=True)
    rows = measure(generations, setting.rounds, device, setting.clock, take=per_token(STEPS))
    setting.store.add(PART, "token", rows)

    graphs = dop_compile(
        model, {PRUNED: decoder.policies[PRUNED]}, compile_options={"mode": "reduce-overhead", "dynamic": False}
    )
    late: dict[str, Callable[..., Any]] = {
        ORIGINAL: decoder.prefill(model, 1),
        "original, whole decoder compiled": decoder.prefill(_decoder_compiled(model, setting.compiler), 1),
        f"{PRUNED} compiled, CUDA graphs of pieces": decoder.prefill(graphs, 1, PRUNED),
    }
    print(f"{PART}, whole decoder, CUDA graphs", flush=True)
    setting.store.add(PART, "whole decoder, CUDA graphs", measure(late, setting.rounds, device, setting.clock))


def _shallow(model: Any) -> Any:
    """Another model object over the same weights, down to the layers, so that compiling leaves the first alone."""
    outer = copy.copy(model)
    outer._modules = dict(model._modules)
    inner = outer._modules["model"] = copy.copy(model.model)
    inner._modules = dict(model.model._modules)
    inner._modules["layers"] = torch.nn.ModuleList(copy.copy(layer) for layer in model.model.layers)
    return outer


def _layers_compiled(model: Any, backend: str) -> Any:
    """As Hugging Face documents it; every layer is a recompilation, for its number in the cache."""
    other = _shallow(model)
    torch._dynamo.config.recompile_limit = 2 * len(other.model.layers)
    for layer in other.model.layers:
        layer.compile(backend=backend, dynamic=True)
    return other


def _decoder_compiled(model: Any, backend: str) -> Any:
    other = _shallow(model)
    other.model.compile(backend=backend)
    return other
