"""Run a pruned decoder graph on sections: what `torch.export` traces.

The compiler's graph is executed node by node. What it leaves to the runtime - moving tokens between sets, masks, the
cache - is done here with slices of sections, slots and plain tensors, so that nothing depends on data but through
tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from dop_compile import ops
from dop_compile.errors import UnsupportedModelError
from dop_compile.hf.kernels import MASK_BUILDERS
from dop_compile.hf.private import sdpa_attention_forward
from dop_compile.identity import Same
from dop_compile.onnx.export.sections import SectionLayout
from dop_compile.onnx.export.slot_masks import build_mask, visible
from dop_compile.passes.graph import DecoderGraph
from dop_compile.runtime.masks import additive
from dop_compile.tokens import TokenSet
from dop_compile.tracing.trace import CACHE_INPUT

__all__ = ["DecoderCall", "run_graph"]


class DecoderCall:
    """One run of a graph.

    Args:
        layout: where atoms stand in the new tokens.
        slots: (batch, tokens) slots of the new tokens.
        past: per layer, the slots (batch, entries) and the keys and values that it holds already.
    """

    def __init__(
        self, layout: SectionLayout, slots: Tensor, past: dict[int, tuple[Tensor, Tensor, Tensor]] | None = None
    ):
        self.layout = layout
        self.slots = slots
        self.past = past or {}
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}
        self._masks: dict[Any, tuple[Tensor, Tensor]] = {}
        self._entries: dict[Any, Tensor] = {}

    def store(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        self.stored[layer] = keys, values
        if layer not in self.past:
            return keys, values
        _, old_keys, old_values = self.past[layer]
        return torch.cat([old_keys, keys], dim=2), torch.cat([old_values, values], dim=2)

    def mask(self, mask: Any, layer: int, queries: TokenSet, keys: TokenSet) -> tuple[Tensor, Tensor]:
        everything = self.layout.universe.all
        past = self.past[layer][0] if layer in self.past else None
        key = (Same(mask), queries, keys, Same(past))
        if key not in self._masks:
            entries_key = (keys, Same(past))
            if entries_key not in self._entries:
                new = self.layout.take(self.slots, keys, everything)
                new = new if keys.atoms else torch.full_like(new, -1)
                self._entries[entries_key] = new if past is None else torch.cat([past, new], dim=1)
            rows = self.layout.take(self.slots, queries, everything)
            self._masks[key] = visible(mask, rows, self._entries[entries_key])
        return self._masks[key]


def run_graph(graph: DecoderGraph, call: DecoderCall, embeds: Tensor, positions: Tensor) -> Tensor:
    """The graph's output, (batch, requested tokens, hidden); what it stores is in `call.stored`.

    Args:
        embeds: (batch, tokens, hidden), all sections one after the other.
        positions: (batch, tokens), or (rows, batch, tokens).

    Raises:
        UnsupportedModelError: the graph needs an input that an exported one does not have.
    """
    given = {"inputs_embeds": embeds, "position_ids": positions, "attention_mask": None, CACHE_INPUT: None}
    given |= dict.fromkeys(("masks", "cache_view"))
    values: dict[fx.Node, Any] = {}
    root = graph.traced.root

    def read(argument: Any) -> Any:
        return fx.map_arg(argument, values.__getitem__)

    for node in graph.graph.nodes:
        if node.op == "placeholder":
            if "index" not in node.meta and node.name not in given and node.users:
                raise UnsupportedModelError(f"the decoder takes {node.name}, which export to ONNX does not support")
            values[node] = node.meta.get("index", given.get(node.name))
        elif node.op == "output":
            result: Tensor = read(node.args[0])
        elif node.op == "get_attr":
            values[node] = _attribute(root, str(node.target))
        elif node.op == "call_module":
            values[node] = root.get_submodule(str(node.target))(*read(node.args), **read(dict(node.kwargs)))
        elif node.op == "call_method":
            subject, *rest = read(node.args)
            values[node] = getattr(subject, str(node.target))(*rest, **read(dict(node.kwargs)))
        else:
            values[node] = _call(call, node, read(node.args), read(dict(node.kwargs)))
    return result


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _call(call: DecoderCall, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target: Any = node.target
    if target in _LOWERED:
        return _LOWERED[target](call, *args, **kwargs)
    if target in MASK_BUILDERS:
        return build_mask(target, args, kwargs)
    if target is sdpa_attention_forward:
        return _attention(*args, **kwargs)
    if node.meta.get("attention"):
        module, query, key, value, mask, *rest = args
        return target(module, query, key, value, mask if mask is None else additive(mask, query), *rest, **kwargs)
    return target(*args, **kwargs)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **kwargs: Any
) -> Any:
    """Hugging Face's sdpa kernel with a mask, but for heads that share keys: not repeated, the operator does that."""
    if kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
    grouped = query.shape[1] != key.shape[1]
    result = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped
    )
    return result.transpose(1, 2).contiguous(), None


def _slice(call: DecoderCall, x: Tensor, spec: Any, batch_dim: int = 0, token_dim: int = 1) -> Tensor:
    return call.layout.take(x, spec.tokens, spec.others[0], token_dim)


def _add(call: DecoderCall, x: Tensor, update: Tensor, spec: Any) -> Tensor:
    return call.layout.add(x, update, spec.tokens, spec.others[0])


def _merge(call: DecoderCall, spec: Any, *sources: Tensor) -> Tensor:
    return call.layout.merge(spec.tokens, spec.others, sources)


def _store(call: DecoderCall, cache: Any, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> Any:
    return call.store(keys, values, layer)


def _select(call: DecoderCall, mask: Any, masks: Any, layer: int, queries: TokenSet, keys: TokenSet) -> Any:
    return call.mask(mask, layer, queries, keys)


_LOWERED: dict[Any, Callable[..., Any]] = {
    ops.token_slice: _slice,
    ops.token_add: _add,
    ops.token_merge: _merge,
    ops.update_cache: _store,
    ops.select_attention_mask: _select,
}
