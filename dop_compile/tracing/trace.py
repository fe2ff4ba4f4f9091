"""Trace a Hugging Face text decoder into an fx graph at module granularity.

The decoder's own forward is traced - masks, rotary tables, anything between layers - not a rewrite of it. Modules that
contain attention are opened down to their projections; every other module (norm, projection, MLP) stays one node and
so keeps its hooks, adapters and quantisation. Hugging Face's mask builders and attention kernels are single nodes.

Refused, as `UnsupportedModelError`: decoders without a layer list, hooks on a module that has to be opened, control
flow on token counts or tensor contents, tensors changed in place, layers whose attention does not go through the
attention interface.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from dop_compile import ops
from dop_compile.errors import UnsupportedModelError
from dop_compile.hf.kernels import ATTENTION_REGISTRY, MASK_BUILDERS, is_attention
from dop_compile.hf.mixers import is_mixer, mixes_no_tokens
from dop_compile.hf.model_path import find_layers
from dop_compile.hf.names import CHANNEL_MIXERS, PACKED_FEATURES, UNPRUNABLE_LAYERS, UNPRUNABLE_SETTINGS
from dop_compile.hf.rebuilt import names_in
from dop_compile.tracing.decoder_inputs import DecoderInputs
from dop_compile.tracing.flat_tokens import unflatten_tokens
from dop_compile.tracing.proxies import BATCH, TOKENS, is_packed
from dop_compile.tracing.tracer import CACHE_INPUT, DecoderTracer

__all__ = [
    "BATCH",
    "CACHE_INPUT",
    "MASK_BUILDERS",
    "PACKED_FEATURES",
    "TOKENS",
    "DecoderInputs",
    "TracedDecoder",
    "is_length",
    "is_packed",
    "trace_decoder",
]


# `x += y` in a forward makes x a new value; what else may have named the old tensor is not followed
_OUT_OF_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


@dataclass
class TracedDecoder:
    """A decoder graph and the modules that its nodes name.

    The graph's placeholders are `inputs_embeds` (batch, tokens, hidden), `position_ids`, `attention_mask` or one
    placeholder per mask, `past_key_values`, and packed visual features; its output is the last hidden state.
    """

    graph: fx.Graph
    root: nn.Module
    inputs: DecoderInputs
    layer_prefix: str
    num_layers: int
    output_class: type | None = None
    mixing: Mapping[int, int] = field(default_factory=dict)
    """Per layer, how many branches mix tokens: its attention, and what else keeps a state."""
    sources: Mapping[int, int] = field(default_factory=dict)
    """Of layers whose attention reads the keys and values of an earlier layer, which one that is."""

    def can_begin_at(self, layer: int) -> bool:
        """Whether nothing from this layer on reads keys and values of an earlier one."""
        return all(reader < layer or source >= layer for reader, source in self.sources.items())

    def copy(self) -> TracedDecoder:
        """A graph of its own, to be rewritten; modules and example values are shared."""
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        result = graph.graph_copy(self.graph, copied)
        output = self.graph.output_node()
        graph.output(result).meta = dict(output.meta)
        return replace(self, graph=graph)

    def layer_of(self, node: fx.Node) -> int | None:
        """The layer whose forward created the node, or for which a pass inserted it."""
        if "layer" in node.meta:
            return int(node.meta["layer"])
        for path, _ in reversed((node.meta.get("nn_module_stack") or {}).values()):
            if path.startswith(self.layer_prefix + "."):
                return int(path[len(self.layer_prefix) + 1 :].split(".")[0])
        return None


def is_length(node: fx.Node) -> bool:
    """Whether the node asks the cache for the number of past tokens."""
    return node.op == "call_method" and node.target == "get_seq_length"


def _count_mixing(layer: nn.Module) -> int:
    modules = list(layer.modules())
    return any(map(is_attention, modules)) + sum(map(is_mixer, modules))


def _check_openable(path: str, module: nn.Module) -> None:
    """A module that is opened no longer runs its `__call__`: whatever was attached to that must be refused."""
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    hooks: list[Any] = [hook for kind in kinds for hook in kind.values()]
    # Hugging Face leaves recording hooks behind after output_hidden_states; they do nothing unless a record is active
    foreign = [hook for hook in hooks if not getattr(hook, "__module__", "").endswith("output_capturing")]
    if foreign or "forward" in vars(module):
        raise UnsupportedModelError(
            f"{path or 'the decoder'} ({type(module).__name__}) has a forward hook, a backward hook or a "
            "replaced forward; dop_compile opens this module and would bypass it. Remove the hook, or put it on the "
            "norm, projection or MLP inside, where hooks are honoured"
        )
    if is_parametrized(module):
        raise UnsupportedModelError(
            f"{path or 'the decoder'} ({type(module).__name__}) has parametrized weights of its own; dop_compile opens "
            "this module and would compute them once. Remove the parametrization (remove_parametrizations)"
        )


def _check_settings(decoder: nn.Module) -> None:
    for name, reason in UNPRUNABLE_SETTINGS.items():
        if value := getattr(decoder.config, name, None):
            raise UnsupportedModelError(f"{type(decoder).__name__} has {name}={value}: {reason.format(value)}")
    for number, kind in enumerate(getattr(decoder.config, "layer_types", None) or ()):
        if reason := UNPRUNABLE_LAYERS.get(kind, ""):
            raise UnsupportedModelError(f"layer {number} of {type(decoder).__name__} is of type {kind!r}: {reason}")


def _check_parts(decoder: nn.Module, layers: nn.ModuleList) -> None:
    """What stands beside an attention and reads other tokens than its queries and keys."""
    for number, layer in enumerate(layers):
        mixers = tuple(f"{path}." for path, module in layer.named_modules() if is_mixer(module))
        for path, module in layer.named_modules():
            if path.startswith(mixers):
                continue
            where = f"layer {number} of {type(decoder).__name__} holds {path} ({type(module).__name__}), which"
            if path.rpartition(".")[2] == "indexer":
                raise UnsupportedModelError(
                    f"{where} ranks all tokens to choose each query's keys: with fewer tokens it chooses others"
                )
            if isinstance(module, nn.Conv1d) and module.kernel_size[0] > 1:
                raise UnsupportedModelError(
                    f"{where} convolves neighbouring tokens: it needs every token, so none of them can be pruned"
                )


def _without_attention(decoder: nn.Module, number: int, layer: nn.Module, known: set[tuple[str, type]]) -> str:
    """Why a layer without an attention that can be followed is refused; `known` are the children of other layers."""
    own = [
        f"{name} ({type(child).__name__})"
        for name, child in layer.named_children()
        if (name, type(child)) not in known
        and not isinstance(child, nn.Linear)
        and not any(word in name for word in CHANNEL_MIXERS)
    ]
    how = " and ".join(own) or "code of its own"
    where = f"layer {number} of {type(decoder).__name__} ({type(layer).__name__})"
    if known or "att" not in how.lower():
        return (
            f"{where} mixes tokens by {how} instead of attention: a recurrence or convolution needs every token, so "
            "none of them can be pruned"
        )
    return (
        f"{where} mixes tokens by {how}, which does not go through the attention interface ({ATTENTION_REGISTRY}): its "
        "queries, keys and mask cannot be told apart"
    )


def _opened(decoder: nn.Module, layers: nn.ModuleList) -> set[int]:
    """Ids of the modules that contain attention or another token mixer, and of layers that mix no tokens."""
    found: set[int] = set()
    for path, module in decoder.named_modules():
        if not is_mixer(module) and any(is_attention(child) or is_mixer(child) for child in module.modules()):
            _check_openable(path, module)
            found.add(id(module))
    for number, layer in enumerate(layers):
        if found and id(layer) not in found and mixes_no_tokens(layer):
            _check_openable(f"layer {number}", layer)
            found.add(id(layer))
    known = {(name, type(c)) for layer in layers if id(layer) in found for name, c in layer.named_children()}
    for number, layer in enumerate(layers):
        if id(layer) not in found:
            raise UnsupportedModelError(_without_attention(decoder, number, layer, known))
    return found


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    """Autocast would cast the weights to fake tensors, and keep those for everybody."""
    available: bool = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else nullcontext()


def trace_decoder(decoder: nn.Module, inputs: DecoderInputs | None = None) -> TracedDecoder:
    """Trace a text decoder (for example a `LlamaModel`). Any number of threads may trace and run it meanwhile.

    Args:
        decoder: a Hugging Face text decoder, on any device including meta; it is not changed.
        inputs: which optional inputs the graph takes; by default those of a plain cached call.

    Raises:
        UnsupportedModelError: the decoder cannot be traced; the message names the module and the reason.
    """
    inputs = inputs or DecoderInputs()
    _check_settings(decoder)
    layers_path, layers = find_layers(decoder)
    opened = _opened(decoder, layers)
    _check_parts(decoder, layers)
    weight = next(p for p in layers.parameters())
    floating = weight.dtype if weight.dtype.is_floating_point else torch.get_default_dtype()
    tracer = DecoderTracer(decoder, opened, inputs, floating, weight.device)
    try:
        with _without_autocast(weight.device.type):
            graph, output_class = tracer.trace_decoder()
    except Exception as error:  # whatever a forward does with a proxy that it cannot do
        where = f", in {tracer.failed_in}" if tracer.failed_in else ""
        if not names_in(type(decoder).forward) & {builder.__name__ for builder in MASK_BUILDERS}:
            raise UnsupportedModelError(
                f"{type(decoder).__name__} cannot be traced: it builds its attention mask itself, and not by functions "
                f"of transformers.masking_utils, whose masks can be built anew for fewer tokens ({error})"
            ) from error
        raise UnsupportedModelError(f"{type(decoder).__name__} cannot be traced{where}: {error}") from error
    for node in graph.nodes:
        if node.op == "call_method" and node.target == "update":
            node.op, node.target = "call_function", ops.update_cache
            node.meta["effect"] = True
        elif node.op == "call_module" and is_mixer(tracer.root.get_submodule(str(node.target))):
            node.meta["mixer"] = True
            node.meta["effect"] = inputs.cached
        elif node.target in _OUT_OF_PLACE:
            node.target = _OUT_OF_PLACE[node.target]
    unflatten_tokens(graph, tracer.root)
    traced = TracedDecoder(
        graph,
        tracer.root,
        inputs,
        layer_prefix=f"decoder.{layers_path}",
        num_layers=len(layers),
        output_class=output_class,
        mixing={number: _count_mixing(layer) for number, layer in enumerate(layers)},
    )
    return replace(traced, sources=_sources(traced))


def _sources(traced: TracedDecoder) -> dict[int, int]:
    found: dict[int, int] = {}
    for node in traced.graph.nodes:
        if node.meta.get("attention"):
            layer, key = traced.layer_of(node), node.args[2]
            source = traced.layer_of(key) if isinstance(key, fx.Node) else None
            if layer is not None and source is not None and source != layer:
                found[layer] = source
    return found
