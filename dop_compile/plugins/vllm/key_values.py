"""Keys and values of rows that are no queries: their part of the fused projection alone.

On each rank of a tensor parallel model the fused weight is [queries; keys; values] of the rank's own heads, so its tail
is what this rank stores.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from vllm import envs
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention.attention import unified_kv_cache_update
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.platforms import current_platform

__all__ = ["KeyValues"]

logger = logging.getLogger(__name__)


class KeyValues:
    """Stores keys and values of one attention module's rows in its cache.

    Args:
        attention: vLLM's attention of a decoder layer: `qkv_proj`, perhaps `k_norm`, `rotary_emb` and `attn`.
    """

    def __init__(self, attention: Any) -> None:
        self._attention = attention
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None

    def take_weight(self) -> None:
        """Keep the part of the weight that makes keys and values, once it is loaded.

        Quantised weights cannot be cut: there all of the projection is computed, and queries are thrown away.
        """
        projection = self._attention.qkv_proj
        first = self._attention.q_size
        if type(projection.quant_method) is not UnquantizedLinearMethod or envs.VLLM_BATCH_INVARIANT:
            logger.warning("frozen visual tokens pay for queries: this model's projections cannot be cut")
            return
        # On the CPU vLLM packs the weight for its kernels and drops the original
        weight, bias = projection.weight.data[first:], getattr(projection, "bias", None)
        self._weight = weight.clone() if current_platform.is_cpu() else weight
        self._bias = None if bias is None else bias.data[first:].clone()

    def store(self, positions: Tensor, state: Tensor, slots: Tensor) -> None:
        """Write keys and values of (rows, hidden) normalised states into the cache.

        Args:
            positions: (rows,) or (3, rows).
            state: (rows, hidden).
            slots: (rows,) places in the cache.
        """
        inner, attention = self._attention.attn, self._attention
        keys, values = self._project(state)
        if (norm := getattr(attention, "k_norm", None)) is not None:
            keys = norm(keys.reshape(len(keys), -1, attention.head_dim)).reshape(len(keys), -1)
        keys = keys.contiguous()
        # The kernels rotate queries as well: one head that nobody reads
        _, keys = attention.rotary_emb(positions, torch.zeros_like(keys[:, : attention.head_dim]), keys)
        shape = (-1, inner.num_kv_heads, inner.head_size)
        slot_mapping = get_forward_context().slot_mapping
        before = slot_mapping[inner.layer_name]
        slot_mapping[inner.layer_name] = slots
        try:
            unified_kv_cache_update(keys.view(shape), values.reshape(shape), inner.layer_name)
        finally:
            slot_mapping[inner.layer_name] = before

    def _project(self, state: Tensor) -> tuple[Tensor, Tensor]:
        size = self._attention.kv_size
        if self._weight is not None:
            both = torch.nn.functional.linear(state, self._weight, self._bias)
        else:
            both = self._attention.qkv_proj(state)[0][:, -2 * size :]
        keys, values = both.split([size, size], dim=-1)
        return keys, values
