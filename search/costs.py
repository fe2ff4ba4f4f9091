"""The cost of every policy of the split space at once (DOP eq. 11, queries and key-values apart).

A policy of the space keeps visual queries in the first `query` layers, visual keys and values in the first `keys`, the
visual MLP in the first `mlp`, and `n` visual tokens of each sample. Costs are means over the samples' token counts, so
a budget is a fraction of what the samples cost on the original model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dop_compile.hf.dimensions import DecoderDims

__all__ = ["FlopsModel", "KvModel"]

Array = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]


class FlopsModel:
    """Mean eq. 11 FLOPs of the decoder layers over samples.

    Args:
        dims: the decoder's sizes.
        counts: system, visual and text tokens per sample.
        full: visual tokens of the largest sample. A sample that has fewer than `n` keeps all of its own.
    """

    def __init__(self, dims: DecoderDims, counts: Sequence[tuple[int, int, int]], full: int):
        table = np.asarray(counts, dtype=np.float64)
        rest, visual = table[:, 0] + table[:, 2], table[:, 1]
        d, d_kv, h = dims.num_heads * dims.head_dim, dims.num_key_value_heads * dims.head_dim, dims.hidden_size
        self._projection, self._kv, self._scores = 4.0 * h * d, 4.0 * h * d_kv, 4.0 * d
        matrices = 3 if dims.gated else 2
        per_layer = np.array([2.0 * matrices * h * width for width in dims.mlp_widths])
        self._mlp = np.concatenate([[0.0], np.cumsum(per_layer)])
        kept = np.minimum(np.arange(full + 1, dtype=np.float64)[:, None], visual)
        self._v, self._tv, self._vv = kept.mean(1), (kept * rest).mean(1), (kept**2).mean(1)
        layers = dims.num_layers
        attention = layers * ((self._projection + self._kv) * rest + self._scores * rest**2)
        self._base = float((attention + self._mlp[-1] * rest).mean())
        self.original = float(self(np.array(layers), np.array(layers), np.array(layers), np.array(full)))
        """FLOPs of the original model."""

    def __call__(self, query: Ints, keys: Ints, mlp: Ints, n: Ints) -> Array:
        """FLOPs of policies; arguments broadcast against each other."""
        v, tv, vv = self._v[n], self._tv[n], self._vv[n]
        linear = v * (self._projection * query + self._kv * keys + self._mlp[mlp])
        result: Array = self._base + linear + self._scores * (tv * (query + keys) + vv * np.minimum(query, keys))
        return result


class KvModel:
    """Mean bytes of a sample's keys and values after prefill; as `FlopsModel`."""

    def __init__(self, dims: DecoderDims, counts: Sequence[tuple[int, int, int]], full: int, dtype_bytes: int):
        table = np.asarray(counts, dtype=np.float64)
        self._token = 2.0 * dims.num_key_value_heads * dims.head_dim * dtype_bytes
        self._base = float(dims.num_layers * (table[:, 0] + table[:, 2]).mean())
        self._v = np.minimum(np.arange(full + 1, dtype=np.float64)[:, None], table[:, 1]).mean(1)
        self.original = self._token * (self._base + dims.num_layers * float(table[:, 1].mean()))

    def __call__(self, query: Ints, keys: Ints, mlp: Ints, n: Ints) -> Array:
        result: Array = self._token * (self._base + self._v[n] * keys + 0.0 * (query + mlp))
        return result
