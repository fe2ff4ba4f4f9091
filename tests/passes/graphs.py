"""Small decoder graphs, and running them: what the tests of the passes share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from dop_compile import Policy
from dop_compile.passes import PIPELINE, DecoderGraph, Pass, PassReport, check_graph, run_passes
from dop_compile.policy.keep import KeepTable
from dop_compile.runtime.cache import PrunedCache, ReducedView
from dop_compile.runtime.layout import TokenLayout
from dop_compile.runtime.masks import MaskSelector
from dop_compile.runtime.pieces import PieceLibrary
from dop_compile.runtime.program import Program
from dop_compile.tokens import Universe
from dop_compile.tracing.trace import DecoderInputs, trace_decoder
from tests.conformance.text_only import TEXT_ONLY
from tests.families import FAMILIES, HIDDEN

GROUPS = ("system", "visual", "text")
SYSTEM, VISUAL, TEXT = range(3)
LAYERS = 4


@functools.cache
def decoder(name: str = "llama") -> nn.Module:
    """The text decoder of a tiny model; no test changes it."""
    return FAMILIES[name].build().get_decoder()


SHARING_LAYERS = 6


@functools.cache
def sharing_decoder() -> nn.Module:
    """Six layers: 3 and 5 read the keys and values of layer 1, layer 4 those of layer 2, a sliding one."""
    return TEXT_ONLY["gemma4_unified_shared_text"].build().get_decoder()


def kv_only_from(layer: int, layers: int = LAYERS) -> Policy:
    """Visual tokens only supply keys and values from a layer on."""
    return Policy.depthwise(layers, mha_query_depth=layer, mha_key_value_depth=layers, mlp_depth=layer)


def build(
    policy: Policy,
    passes: Sequence[Pass] = PIPELINE,
    *,
    model: nn.Module | None = None,
    groups: tuple[str, ...] = GROUPS,
    requested: frozenset[str] | None = None,
    cached: bool = True,
    **run: Any,
) -> DecoderGraph:
    """A graph after some passes, verified after each. `requested`: groups of which some rows are; None for all rows."""
    keep = KeepTable.from_policy(policy, groups)
    inputs = DecoderInputs(cached=cached)
    universe = Universe(keep.groups, requested if keep.groups == groups else requested and frozenset(keep.groups))
    graph = DecoderGraph(trace_decoder(model or decoder(), inputs), keep, universe, cached)
    return run_passes(graph, passes, **({"check": check_graph} | run))


def codes_of(*rows: str) -> Tensor:
    """(batch, tokens) group codes from text such as "ssvvvtt" ("." is padding)."""
    return torch.tensor([[".svt".index(token) - 1 for token in row] for row in rows])


def run_graph(graph: DecoderGraph, codes: Tensor, last_rows: int | None = None, seed: int = 0) -> tuple[Tensor, Any]:
    """Hidden states (batch, requested, hidden) of random embeddings, and the cache, from the graph run eagerly.

    The embeddings depend on the seed alone; a graph that begins later has them for its residual stream. `last_rows`:
    how many last rows are requested; None for all.
    """
    batch, length = codes.shape
    embeds = torch.randn(batch, length, HIDDEN, generator=torch.Generator().manual_seed(seed))
    requested = torch.ones_like(codes, dtype=torch.bool)
    if last_rows is not None:
        requested[:, : length - last_rows] = False
    codes = codes.clamp(max=len(graph.universe.groups) - 1)
    layout = TokenLayout(graph.universe, codes, requested & (codes >= 0), torch.device("cpu"))
    mask = (codes >= 0).long() if bool((codes < 0).any()) else None
    values = {
        "inputs_embeds": embeds,
        "residual_stream": embeds,
        "position_ids": torch.arange(length).expand(batch, -1),
        "attention_mask": mask,
        "past_key_values": PrunedCache() if graph.cached else None,
        "cache_view": ReducedView(0),
        "masks": MaskSelector(layout, {}, 0),
    }
    program = Program(graph, PieceLibrary("eager"))
    with torch.no_grad():
        hidden = program(values, lambda spec: layout.index(spec.kind, spec.tokens, spec.others))
    return hidden, values["past_key_values"]


def up_to(last: Pass) -> tuple[Pass, ...]:
    """The pipeline's passes as far as one of them."""
    return PIPELINE[: PIPELINE.index(last) + 1]


def report_of(graph: DecoderGraph, item: Pass) -> PassReport:
    """What a pass did."""
    return next(report for report in graph.reports if report.name == item.name)


def calls_of(graph: DecoderGraph, part: str, layer: int | None = None) -> list[fx.Node]:
    """Calls of modules whose path ends in `part`, of one layer or of all."""
    return [
        node
        for node in graph.graph.nodes
        if node.op == "call_module" and str(node.target).endswith(part) and layer in (None, graph.traced.layer_of(node))
    ]


def targets(graph: DecoderGraph, function: Any) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.target is function]
