"""Find the residual stream and its MHA/MLP blocks, by structure.

Requires: a traced decoder graph.
Ensures:  `junctions` lists, in order, every addition to the residual stream with its branches; each branch knows its
          layer, its kind (MHA if it holds an attention kernel or another token mixer, else MLP) and the token sets
          that the keep table gives.
Numerics: exact; no node changes.

A residual branch is what lies between x and ``add(x, branch)``, whatever norms and multipliers it holds. Cases:
1. pre-norm, post-norm and sandwich-norm blocks;
2. parallel MHA and MLP: ``x + mha(x) + mlp(x)`` in any order of addition is one junction with two branches;
3. anything else that replaces the stream between layers (DeepStack adds visual features) or scales it at the end of
   one: a transform, kept whole;
4. a recurrence or convolution that keeps a state, in place of the attention or beside it;
5. an attention that reads the very keys and values of an earlier layer's (Gemma 4 E2B).
Refused: 6. no addition to a stream; 7. a constant added to it; 8. a branch with several attention kernels or of several
layers; 9. a layer whose token mixing is not a branch of its own; 10. a layer that replaces the stream by more than
token-wise arithmetic, or goes on after its last addition (OPT's MLP on flattened tokens); 11. a branch that reads two
stream values; 12. keys that are made of what an earlier layer stores.
"""

from __future__ import annotations

import operator
from collections import Counter

import torch
from torch import Tensor, fx

from dop_compile import ops
from dop_compile.errors import PassError
from dop_compile.hf.kernels import MASK_BUILDERS
from dop_compile.passes.blocks import MHA, MLP, Block, Junction, policy_sets
from dop_compile.passes.cleanup import eliminate_dead_nodes, eliminate_duplicates
from dop_compile.passes.graph import DecoderGraph, depends_on, is_add
from dop_compile.passes.infra import Pass
from dop_compile.passes.report import PassReport
from dop_compile.tracing.trace import BATCH, CACHE_INPUT, TOKENS, is_length, is_packed

__all__ = ["ANNOTATE"]

_TOKEN_WISE = {ops.masked_assign, operator.add, operator.mul, operator.getitem, torch.add, torch.mul}
_TOKEN_WISE_METHODS = {"clone", "to", "contiguous", "squeeze", "masked_scatter"}


class _StreamFinder:
    def __init__(self, graph: DecoderGraph):
        self.target = graph
        self.nodes = list(graph.graph.nodes)
        first = next((n for n in self.nodes if graph.traced.layer_of(n) is not None), self.nodes[-1])
        before_layers = set(self.nodes[: self.nodes.index(first)])
        # Rotary tables take the embeddings for their dtype alone: that is no dependence on the stream
        self.position, self.ancestors = depends_on(graph.graph, cut=before_layers)
        self.hidden = next(node for node in self.nodes if node.name == "inputs_embeds").meta["val"].shape[-1]
        self._streams = [self.position[node] for node in self.nodes if self.is_stream(node)]

    def is_before(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether b depends on a."""
        return a is not b and bool(self.ancestors[b] >> self.position[a] & 1)

    def is_stream(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        return isinstance(value, Tensor) and tuple(value.shape) == (BATCH, TOKENS, self.hidden)

    def is_positional(self, node: fx.Node) -> bool:
        """Whether the node depends on nothing of the stream (rotary tables, positions)."""
        bits = self.ancestors[node]
        return not any(bits >> number & 1 for number in self._streams)

    def last(self) -> fx.Node:
        layer_of = self.target.traced.layer_of
        ends: list[fx.Node] = [n for n in self.nodes if is_add(n) and self.is_stream(n) and layer_of(n) is not None]
        if ends:
            return ends[-1]
        raise PassError("annotate", "no addition to a residual stream was found in any layer")

    def end(self, last: fx.Node) -> fx.Node:
        """The stream behind the layers: after the last addition, only token-wise arithmetic (a scale) may come."""
        end = last
        for node in self.nodes[self.position[last] + 1 :]:
            layer = self.target.traced.layer_of(node)
            if layer is not None and self.is_before(last, node):
                if self.is_stream(node) and self.is_token_wise(node):
                    end = node
                    continue
                raise PassError(
                    "annotate",
                    "the layer goes on after its last addition to the residual stream; only what is added to it can "
                    "be pruned",
                    node=node.name,
                    layer=layer,
                )
        return end

    @staticmethod
    def is_token_wise(node: fx.Node) -> bool:
        if node.op == "call_method":
            return node.target in _TOKEN_WISE_METHODS or is_packed(node.meta.get("val"))
        return node.target in _TOKEN_WISE

    def terms(self, node: fx.Node) -> list[fx.Node]:
        """Leaves of a tree of additions whose inner sums nobody else reads."""
        leaves: list[fx.Node] = []
        for operand in node.args[:2]:
            if not isinstance(operand, fx.Node):
                raise PassError(
                    "annotate",
                    f"adds the constant {operand!r} to the residual stream",
                    node=node.name,
                    layer=self.target.traced.layer_of(node),
                )
            inner = is_add(operand) and self.is_stream(operand) and len(operand.users) == 1
            if inner and self.target.traced.layer_of(operand) == self.target.traced.layer_of(node):
                leaves.extend(self.terms(operand))
            else:
                leaves.append(operand)
        return leaves

    def junction(self, node: fx.Node) -> Junction | None:
        """The junction that ends in `node`; None if the node does not add branches to a stream value."""
        if not (is_add(node) and self.is_stream(node)):
            return None
        terms = self.terms(node)
        for stream in terms:
            others = [term for term in terms if term is not stream]
            if self.is_stream(stream) and all(self.is_before(stream, term) for term in others):
                return Junction(stream, node, tuple(self.block(stream, term) for term in others))
        return None

    def block(self, stream: fx.Node, branch: fx.Node) -> Block:
        inside = [
            node
            for node in self.nodes[self.position[stream] + 1 : self.position[branch] + 1]
            if self.is_before(stream, node) and (node is branch or self.is_before(node, branch))
        ]
        kernels = [node for node in inside if node.meta.get("attention") or node.meta.get("mixer")]
        layers = {self.target.traced.layer_of(node) for node in inside} - {None}
        if len(kernels) > 1 or len(layers) != 1:
            raise PassError(
                "annotate",
                f"the branch holds {len(kernels)} attention kernels or token mixers of layers "
                f"{sorted(map(str, layers))}; expected at most one, of one layer",
                node=branch.name,
                layer=self.target.traced.layer_of(branch),
            )
        layer = next(iter(layers))
        assert layer is not None
        updates = [node for node in inside if node.target is ops.update_cache]
        kind = MHA if kernels else MLP
        mixer = next((node for node in kernels if node.meta.get("mixer")), None)
        everything = self.target.universe.all
        return Block(
            kind,
            layer,
            branch,
            tuple(inside),
            *(everything, everything, everything),
            attention=kernels[0] if kernels and mixer is None else None,
            mixer=mixer,
            mixes=mixer is not None,
            update=updates[0] if updates else None,
        )

    def transform(self, node: fx.Node) -> Junction | None:
        """A step that replaces the stream without being a branch; None where the stream begins."""
        earlier = [
            other
            for other in self.nodes[: self.position[node]]
            if self.is_before(other, node)
            and is_add(other)
            and self.is_stream(other)
            and self.target.traced.layer_of(other) is not None
        ]
        if not earlier:
            return None
        stream = earlier[-1]
        steps = [n for n in self.nodes if self.is_before(stream, n) and (n is node or self.is_before(n, node))]
        token_wise = all(map(self.is_token_wise, steps))
        layer = self.target.traced.layer_of(node)
        if layer is not None and not token_wise:
            raise PassError(
                "annotate",
                "the residual stream is replaced by other means than adding a branch to it; what the layer does there "
                "cannot be pruned",
                node=node.name,
                layer=layer,
            )
        return Junction(stream, node, (), token_wise)


def _annotate(graph: DecoderGraph, report: PassReport) -> None:
    eliminate_dead_nodes(graph.graph)
    _use_reduced_lengths_in_masks(graph)
    finder = _StreamFinder(graph)
    # Every layer unpacks the same rotary tables: once is enough
    eliminate_duplicates(graph.graph, finder.is_positional, training=graph.traced.root.training)
    finder = _StreamFinder(graph)
    current = finder.end(finder.last())
    junctions: list[Junction] = []
    while True:
        step = finder.junction(current) or finder.transform(current)
        if step is None:
            break
        junctions.append(step)
        current = step.stream
    graph.entry = current
    graph.junctions = junctions[::-1]
    _number_parts(graph)
    _find_sources(graph)
    blocks = list(graph.blocks)
    for name, sets in policy_sets(blocks, graph.universe, graph.keep).items():
        next(block for block in blocks if block.name == name).sets = sets
    _check_found(graph)
    report.rewritten = sum(1 for _ in graph.blocks)
    for step in graph.junctions:
        if not step.blocks:
            report.kept.append(f"{step.out.name}: replaces the residual stream, for all tokens")


def _check_found(graph: DecoderGraph) -> None:
    """Every layer's token mixing is a branch of its own, and no layer was lost."""
    found = Counter(block.layer for block in graph.blocks if block.kind == MHA)
    expected = graph.traced.mixing
    layers = [number for number in range(graph.traced.num_layers) if found[number] != expected[number]]
    if layers:
        raise PassError(
            "annotate",
            f"layers {layers} have no attention branch of their own on the residual stream; a layer whose token "
            "mixing is not a branch needs every token and cannot be pruned",
        )
    if lost := set(range(graph.traced.num_layers)) - {block.layer for block in graph.blocks}:
        raise PassError("annotate", f"layers {sorted(lost)} add nothing to the residual stream")


def _number_parts(graph: DecoderGraph) -> None:
    seen: Counter[tuple[str, int]] = Counter()
    for block in graph.blocks:
        block.part = seen[block.kind, block.layer]
        seen[block.kind, block.layer] += 1


def _find_sources(graph: DecoderGraph) -> None:
    """Tell attentions that read the keys and values of an earlier layer, which they are given as they are."""
    suppliers: dict[tuple[object, ...], Block] = {}
    for block in graph.blocks:
        if block.attention is None:
            continue
        given = block.attention.args[2:4]
        own = [node in block.nodes for node in given]
        if all(own):
            suppliers[given] = block
        elif any(own) or given not in suppliers:
            raise PassError(
                "annotate",
                "its keys and values are made of those of an earlier layer; only the very ones that an earlier "
                "attention is given can be followed",
                node=block.attention.name,
                layer=block.layer,
            )
        else:
            block.source = suppliers[given]


def _use_reduced_lengths_in_masks(graph: DecoderGraph) -> None:
    """Who asks the cache for its length - mask builders, layers that count - gets it after reduction, from a view."""
    if not graph.cached:
        return
    builders = [node for node in graph.graph.nodes if node.target in MASK_BUILDERS or is_length(node)]
    if not builders:
        return
    cache = next(node for node in graph.graph.nodes if node.name == CACHE_INPUT)
    with graph.graph.inserting_after(cache):
        view = graph.graph.placeholder("cache_view")
    for node in builders:
        node.replace_input_with(cache, view)


ANNOTATE = Pass("annotate", _annotate, optional=False, before=("slice_operations",))
