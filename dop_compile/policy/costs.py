"""What a policy costs: decoder-prefill FLOPs (DOP eq. 11, queries and key-values apart) and KV-cache bytes.

All counts are per sample and of the decoder layers alone: no embedding, norm, router, vision tower or
lm_head, and no discount for causal or sliding-window masks, as in the paper. One multiply-add is 2 FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dop_compile.checks import integer, store
from dop_compile.hf.dimensions import DecoderDims
from dop_compile.policy.policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "DecoderDims",
    "LayerTokens",
    "attention_flops",
    "group_counts",
    "kv_cache_bytes",
    "layer_flops",
    "policy_tokens",
    "prefill_flops",
    "prefill_flops_ratio",
    "state_bytes",
]


@dataclass(frozen=True)
class LayerTokens:
    """Tokens of one sample that take part in a layer: as queries, as keys and values, in the MLP."""

    query: int
    key_value: int
    mlp: int

    def __post_init__(self) -> None:
        for field in ("query", "key_value", "mlp"):
            store(self, field, integer(field, getattr(self, field), low=0))


def layer_flops(dims: DecoderDims, tokens: LayerTokens, layer: int) -> int:
    """FLOPs of one decoder layer for one sample (eq. 11): 4 n_q h d + 4 n_k h d_kv + 4 n_q n_k d + 6 n_P h m.

    d = heads x head_dim and d_kv = KV heads x head_dim, 0 where the layer reads keys and values of an earlier one; a
    plain MLP costs 4 n_P h m, an output gate of the attention 2 n_q h d more. A token mixer that is not attention costs
    n_k times what one token of its sequence does: 2 for each weight of its projections and convolution, and 4 (state
    space) or 6 (delta rule) for each number of its recurrent state. `layer` counts from 0.
    """
    layer = integer("layer", layer, low=0, high=dims.num_layers - 1)
    attention = attention_flops(dims, layer, tokens.query, tokens.key_value) if dims.attends[layer] else 0
    mixers = tokens.key_value * dims.mixer_flops[layer]
    matrices = 3 if dims.gated else 2
    width = matrices * dims.mlp_widths[layer] + 2 * dims.side_sizes[layer]
    return attention + mixers + 2 * tokens.mlp * dims.hidden_size * width


def attention_flops(dims: DecoderDims, layer: int, queries: int, keys: int, supplied: int | None = None) -> int:
    """FLOPs of a layer's attention: 4 n_q h d (6 with an output gate) + 4 n_k h d_kv + 4 n_q n_k d.

    `supplied`: of how many tokens keys and values are projected; None: of the `keys` that the queries meet.
    """
    d, d_kv = dims.query_width(layer), dims.key_value_width(layer)
    supplied = keys if supplied is None else supplied
    projections = 2 * dims.hidden_size * ((3 if dims.gated_attention else 2) * queries * d + 2 * supplied * d_kv)
    return projections + 4 * queries * keys * d


def group_counts(policy: Policy, system: int, visual: int, text: int) -> dict[str, int]:
    """Tokens of one sample that enter the decoder, by group in sequence order; counts given before reduction.

    Without visual tokens the whole prompt is text, whatever `system` says: only a text policy prunes it.
    """
    system, text = integer("system", system, low=0), integer("text", text, low=0)
    given = integer("visual", visual, low=0)
    entering = given if policy.visual_tokens is None else min(given, policy.visual_tokens)
    parts = {"visual": entering}
    if policy.salient_fraction is not None:
        # Half up, as round() would make the count depend on whether its neighbour is even.
        salient = min(entering, math.floor(policy.salient_fraction * entering + 0.5))
        parts = {"visual_salient": salient, "visual_rest": entering - salient}
    if policy.ranking is not None:
        parts = policy.ranking.counts(entering)
    return {"system": system, **parts, "text": text} if given else {"system": 0, **parts, "text": system + text}


def policy_tokens(policy: Policy, system: int, visual: int, text: int) -> tuple[LayerTokens, ...]:
    """Per layer, the tokens of one sample that take part; counts given before reduction, as in `group_counts`."""
    counts = group_counts(policy, system, visual, text)

    def taking_part(layer: int, module: str) -> int:
        return sum(count for group, count in counts.items() if policy.keeps(group, layer, module))

    return tuple(
        LayerTokens(taking_part(n, "mha_query"), taking_part(n, "mha_key_value"), taking_part(n, "mlp"))
        for n in range(policy.num_layers)
    )


def prefill_flops(
    config: PreTrainedConfig | DecoderDims,
    policy: Policy,
    system: int = 35,
    visual: int = 576,
    text: int = 100,
) -> int:
    """FLOPs of the decoder layers for one sample's prompt (DOP eq. 11).

    `system`, `visual`, `text`: tokens per sample before reduction. ValueError for a policy of another depth.
    """
    dims = config if isinstance(config, DecoderDims) else DecoderDims.from_config(config)
    policy.check_layers(dims.num_layers)
    layers = enumerate(policy_tokens(policy, system, visual, text))
    return sum(layer_flops(dims, tokens, layer) for layer, tokens in layers)


def prefill_flops_ratio(
    config: PreTrainedConfig | DecoderDims,
    policy: Policy,
    system: int = 35,
    visual: int = 576,
    text: int = 100,
) -> float:
    """`prefill_flops` as a fraction of the unpruned decoder's: the budget the policy spends, in [0, 1]."""
    dims = config if isinstance(config, DecoderDims) else DecoderDims.from_config(config)
    full = prefill_flops(dims, Policy.full(dims.num_layers), system, visual, text)
    if not full:
        raise ValueError("system, visual, text: expected at least one token, got none")
    return prefill_flops(dims, policy, system, visual, text) / full


def kv_cache_bytes(dims: DecoderDims, tokens_per_layer: Sequence[LayerTokens], dtype_bytes: int = 2) -> int:
    """Bytes of one sample's cache after prefill: 2 n_k d_kv `dtype_bytes` in each layer that stores keys and values.

    Where later layers read a layer's keys, n_k is what it keeps itself; `explain` counts what they keep besides. The
    states of other token mixers are of one size, however many tokens they have seen (`state_bytes`).
    """
    dtype_bytes = integer("dtype_bytes", dtype_bytes, low=1)
    if len(tokens_per_layer) != dims.num_layers:
        raise ValueError(f"tokens_per_layer: expected one per layer ({dims.num_layers}), got {len(tokens_per_layer)}")
    attending = [layer for layer in range(dims.num_layers) if dims.attends[layer]]
    numbers = sum(2 * tokens_per_layer[layer].key_value * dims.key_value_width(layer) for layer in attending)
    return dtype_bytes * numbers + sum(state_bytes(dims, layer, dtype_bytes) for layer in range(dims.num_layers))


def state_bytes(dims: DecoderDims, layer: int, dtype_bytes: int = 2) -> int:
    """Bytes of one sample's convolution windows, in the model's dtype, and recurrent states, in float32, in a layer."""
    return dims.window_numbers[layer] * dtype_bytes + 4 * dims.state_numbers[layer]
