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
from dop_compile.policy.costs import LayerTokens, layer_flops, state_bytes

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
        self._scores = 4.0
        layers = range(dims.num_layers)
        alone = [LayerTokens(1, 0, 0), LayerTokens(0, 1, 0), LayerTokens(0, 0, 1)]
        widths = [dims.query_width(layer) * attends for layer, attends in enumerate(dims.attends)]
        # Of the first layers, by how many: what a query, a key and a token in the MLP cost, and widths of attentions
        self._query, self._key, self._mlp, self._attentions = (
            np.concatenate([[0.0], np.cumsum(np.array(per_layer, dtype=np.float64))])
            for per_layer in (*([layer_flops(dims, t, n) for n in layers] for t in alone), widths)
        )
        kept = np.minimum(np.arange(full + 1, dtype=np.float64)[:, None], visual)
        self._v, self._tv, self._vv = kept.mean(1), (kept * rest).mean(1), (kept**2).mean(1)
        per_token = self._query[-1] + self._key[-1] + self._mlp[-1]
        self._base = float((per_token * rest + self._attentions[-1] * self._scores * rest**2).mean())
        all_layers = np.array(dims.num_layers)
        self.original = float(self(all_layers, all_layers, all_layers, np.array(full)))
        """FLOPs of the original model."""

    def __call__(self, query: Ints, keys: Ints, mlp: Ints, n: Ints) -> Array:
        """FLOPs of policies; arguments broadcast against each other."""
        v, tv, vv = self._v[n], self._tv[n], self._vv[n]
        linear = v * (self._query[query] + self._key[keys] + self._mlp[mlp])
        attentions = self._attentions
        pairs = tv * (attentions[query] + attentions[keys]) + vv * attentions[np.minimum(query, keys)]
        result: Array = self._base + linear + self._scores * pairs
        return result


class KvModel:
    """Mean bytes of a sample's cache after prefill, keys and values and states of mixers; as `FlopsModel`."""

    def __init__(self, dims: DecoderDims, counts: Sequence[tuple[int, int, int]], full: int, dtype_bytes: int):
        table = np.asarray(counts, dtype=np.float64)
        self._token = 2.0 * dtype_bytes
        widths = [dims.key_value_width(layer) * attends for layer, attends in enumerate(dims.attends)]
        self._attentions = np.concatenate([[0.0], np.cumsum(np.array(widths, dtype=np.float64))])
        self._states = float(sum(state_bytes(dims, layer, dtype_bytes) for layer in range(dims.num_layers)))
        self._base = float(self._attentions[-1] * (table[:, 0] + table[:, 2]).mean())
        self._v = np.minimum(np.arange(full + 1, dtype=np.float64)[:, None], table[:, 1]).mean(1)
        visual = float(self._attentions[-1]) * float(table[:, 1].mean())
        self.original = self._token * (self._base + visual) + self._states

    def __call__(self, query: Ints, keys: Ints, mlp: Ints, n: Ints) -> Array:
        entries = self._base + self._v[n] * self._attentions[keys] + 0.0 * (query + mlp)
        result: Array = self._token * entries + self._states
        return result
