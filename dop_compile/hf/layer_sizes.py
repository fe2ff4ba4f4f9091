"""Sizes of the layers of decoders with token mixers besides attention or unlike layers, read off the layers themselves.

What a mixer projects, how long its window is and what state it keeps stand in no common place of configurations. So the
decoder is built without weights (on the meta device), its matrices are counted, and one token is sent through each
mixer to see the state that it keeps.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache

from dop_compile.hf.kernels import is_attention
from dop_compile.hf.mixers import is_mixer
from dop_compile.hf.model_path import find_layers
from dop_compile.hf.names import EXPERT_COUNTS
from dop_compile.hf.rebuilt import names_in
from dop_compile.hf.spellings import CACHE, spelled

__all__ = ["LayerSizes", "layer_sizes"]

_DELTA_RULE, _STATE_SPACE = 6, 4
"""FLOPs of a token per number of a recurrent state, a multiply-add being 2: a state space adds to its state and reads
it; the delta rule first reads what it is to replace. The decay is element-wise and not counted."""


@dataclass(frozen=True)
class LayerSizes:
    """One layer.

    `attends`: it holds an attention, of `query_width` (0 where that is not told): twice heads x head_dim where an
    output gate is projected too; `key_width` and `value_width`, of the keys and values that it projects.
    `mixer_flops`: of a token in its mixers' sequence. `window_numbers` and `state_numbers`: what a sample's
    convolutions (in the model's dtype) and recurrences (in float32) keep. `mlp_weights`: of the matrices that a token
    passes in the MLP, routers left out.
    """

    attends: bool
    query_width: int
    key_width: int
    value_width: int
    mixer_flops: int
    window_numbers: int
    state_numbers: int
    mlp_weights: int


def layer_sizes(text: Any) -> tuple[LayerSizes, ...]:
    """Of each layer of a text decoder's configuration; ValueError where transformers has no such decoder."""
    key = f"{type(text)} {json.dumps(text.to_dict(), sort_keys=True, default=str)}"
    if key not in _KNOWN:
        _KNOWN[key] = _read(text)
    return _KNOWN[key]


_KNOWN: dict[str, tuple[LayerSizes, ...]] = {}
"""By a configuration's text, since costs are asked for policy by policy."""


def _read(config: Any) -> tuple[LayerSizes, ...]:
    if type(config) not in AutoModel._model_mapping:
        raise ValueError(f"{config.model_type}: transformers has no decoder of this configuration to read sizes off")
    with torch.device("meta"), torch.no_grad():
        decoder: nn.Module = AutoModel.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
        return tuple(_of_layer(layer, number, config) for number, layer in enumerate(find_layers(decoder)[1]))


def _of_layer(layer: nn.Module, number: int, config: Any) -> LayerSizes:
    attentions = list(filter(is_attention, layer.modules()))
    mixers = list(filter(is_mixer, layer.modules()))
    mixed = {id(part) for module in (*attentions, *mixers) for part in module.modules()}
    projections = [[getattr(m, f"{kind}_proj", None) for m in attentions] for kind in "qkv"]
    widths = [sum(p.out_features for p in kind if isinstance(p, nn.Linear)) for kind in projections]
    found = [_of_mixer(mixer, number, config) for mixer in mixers]
    return LayerSizes(
        attends=bool(attentions),
        query_width=widths[0],
        key_width=widths[1],
        value_width=widths[2],
        mixer_flops=sum(flops for flops, _, _ in found),
        window_numbers=sum(window for _, window, _ in found),
        state_numbers=sum(state for _, _, state in found),
        mlp_weights=sum(_mlp_weights([m for m in layer.modules() if id(m) not in mixed], config)),
    )


def _mlp_weights(modules: Iterable[nn.Module], config: Any) -> Iterator[int]:
    """Dense matrices (shared experts among them), and those of the experts that a token is routed to."""
    active = getattr(config, "num_experts_per_tok", None) or 1
    for module in modules:
        if isinstance(module, nn.Linear) and not _is_router(module, config):
            yield module.weight.numel()
        for weight in module.parameters(recurse=False):
            if weight.dim() == 3:  # one matrix per expert
                yield active * weight[0].numel()


def _is_router(module: nn.Linear, config: Any) -> bool:
    return module.out_features in {1, *(getattr(config, name, None) for name in EXPERT_COUNTS)}


def _of_mixer(mixer: nn.Module, number: int, config: Any) -> tuple[int, int, int]:
    """FLOPs per token, numbers in its windows and in its recurrent state."""
    cache = DynamicCache(config=config)
    mixer(torch.empty(1, 1, config.hidden_size, dtype=torch.bfloat16), **spelled(type(mixer).forward, {CACHE: cache}))
    stored: Any = cache.layers[number]
    window, recurrent = _count(stored.conv_states.values()), _count(stored.recurrent_states.values())
    matrices = sum(m.weight.numel() for m in mixer.modules() if isinstance(m, nn.Linear | nn.Conv1d))
    rule = _DELTA_RULE if any("delta" in name for name in names_in(type(mixer).forward)) else _STATE_SPACE
    return 2 * matrices + rule * recurrent, window, recurrent


def _count(states: Iterable[Tensor | None]) -> int:
    return sum(state.numel() for state in states if state is not None)
