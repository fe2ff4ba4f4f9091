"""Check that a graph is legal and prunes what the keep table prunes, and nothing else.

Requires: any graph; what is checked beyond `graph.lint()` needs `slice_operations` to have run.
Ensures:  the numbered checks below hold, or a `PassError` names the pass, the layer and the node.
Numerics: exact; nothing is changed.

The checks do not trust the token sets that passes note on nodes: that of every value is found anew, from the index
tensors that made it.

1. Layout: no operation mixes values of different token sets; slices, merges and additions use the index of their sets.
2. Blocks: each computes for exactly the tokens that the keep table and, after `remove_dead`, liveness give it; one
   attention kernel per layer with queries, of its queries, keys and part of the mask, or a mixer of its sequence; keys
   and values of exactly the tokens that supply them stored once, by the layer whose they are.
3. Stream: every block reads each of its tokens after all earlier writes to it and none other; see `stream_check`.
"""

from __future__ import annotations

import operator
from typing import NoReturn

from torch import fx

from dop_compile import ops
from dop_compile.errors import PassError
from dop_compile.hf.kernels import MASK_BUILDERS
from dop_compile.passes.blocks import Block, IndexSpec, policy_sets
from dop_compile.passes.graph import DecoderGraph, has_tokens
from dop_compile.passes.infra import Pass
from dop_compile.passes.remove_dead import find_live
from dop_compile.passes.report import PassReport
from dop_compile.passes.stream_check import check_stream
from dop_compile.tokens import TokenSet

__all__ = ["VERIFY", "check_graph"]

_WITHOUT_TOKENS = (
    ops.select_attention_mask,
    ops.select_padding_mask,
    ops.update_cache,
    ops.preview_cache,
    ops.rank_tokens,
    ops.ranked_index,
    *MASK_BUILDERS,
)
_TOKEN_INPUTS = ("inputs_embeds", "residual_stream", "position_ids")


class _Verifier:
    def __init__(self, graph: DecoderGraph):
        self.graph = graph
        self.layout: dict[fx.Node, TokenSet] = {}

    def fail(self, message: str, node: fx.Node | None = None, block: Block | None = None) -> NoReturn:
        layer = block.layer if block is not None else None if node is None else self.graph.traced.layer_of(node)
        raise PassError("verify", message, node=None if node is None else node.name, layer=layer)

    # --- 1. layout ------------------------------------------------------------------------------------------------

    def find_layouts(self) -> None:
        for node in self.graph.graph.nodes:
            tokens = self._layout(node)
            if tokens is not None:
                self.layout[node] = tokens

    def _layout(self, node: fx.Node) -> TokenSet | None:
        if node.op == "placeholder":
            names = (*_TOKEN_INPUTS, *(name for name, *_ in self.graph.traced.inputs.token_values))
            return self.graph.universe.all if node.name in names else None
        if node.target is ops.token_slice:
            return self._moved(node, "gather", node.args[1], (node.args[0],))
        if node.target is ops.token_merge:
            return self._moved(node, "merge", node.args[0], node.args[1:])
        if node.target is ops.token_add:
            spec = self._spec(node, "scatter", node.args[2])
            self._expect(node, node.args[1], spec.tokens)
            self._expect(node, node.args[0], spec.others[0])
            return spec.others[0]
        if node.meta.get("attention"):
            return self.layout.get(node.args[1])  # type: ignore[arg-type]
        if self._is_without_tokens(node):
            return None
        found = {self.layout[source] for source in node.all_input_nodes if source in self.layout}
        if len(found) > 1:
            self.fail(f"combines values of the tokens {' and '.join(sorted(map(str, found)))}", node)
        if not found and has_tokens(node):
            return self.graph.universe.all  # made of the number of tokens alone
        return found.pop() if found else None

    def _is_without_tokens(self, node: fx.Node) -> bool:
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            return node.args[0] not in self.layout
        return node.target in _WITHOUT_TOKENS or (node.op == "call_method" and node.target == "size")

    def _moved(self, node: fx.Node, kind: str, index: object, sources: tuple[object, ...]) -> TokenSet:
        spec = self._spec(node, kind, index)
        if len(sources) != len(spec.others):
            self.fail(f"takes tokens from {len(sources)} values with the index {spec.name}", node)
        for source, held in zip(sources, spec.others, strict=True):
            self._expect(node, source, held)
        if any(atom not in held.atoms for held in [_union(spec)] for atom in spec.tokens.atoms):
            self.fail(f"takes {spec.tokens} out of {_union(spec)}, which does not hold them", node)
        return spec.tokens

    def _spec(self, node: fx.Node, kind: str, index: object) -> IndexSpec:
        spec = index.meta.get("index") if isinstance(index, fx.Node) else None
        if not isinstance(spec, IndexSpec) or spec.kind != kind:
            self.fail(f"needs a {kind} index, has {index}", node)
        return spec

    def _expect(self, node: fx.Node, source: object, tokens: TokenSet) -> None:
        found = self.layout.get(source) if isinstance(source, fx.Node) else None
        if found != tokens:
            self.fail(f"reads {source}, which holds the tokens {found}; expected {tokens}", node)

    # --- 2. blocks ------------------------------------------------------------------------------------------------

    def check_blocks(self) -> None:
        graph = self.graph
        sets = policy_sets(list(graph.blocks), graph.universe, graph.keep)
        if graph.has_run("remove_dead"):
            sets = find_live(graph, sets)
        for block in graph.blocks:
            if (wanted := sets[block.name]) != block.sets:
                self.fail(f"computes {block.sets}; the policy asks for {wanted}", None, block)
            if (block.branch is None) != (not block.tokens):
                self.fail(f"{block.name} has {'no' if block.tokens else 'a'} branch for {block.tokens}", None, block)
            if block.branch is not None and self.layout.get(block.branch) != block.tokens:
                held = self.layout.get(block.branch)
                self.fail(f"computes the tokens {held} instead of {block.tokens}", block.branch, block)
            if block.mixes:
                self._check_mixer(block)
            elif block.attends:
                self._check_attention(block)

    def _check_mixer(self, block: Block) -> None:
        runs = bool(block.keys) and (bool(block.tokens) or self.graph.cached)
        if (block.mixer is not None) != runs:
            self.fail(f"has {'no' if runs else 'a'} mixer for the sequence {block.keys}", None, block)
        if block.mixer is None:
            return
        mixed = next((source for source in block.mixer.all_input_nodes if source in self.layout), None)
        self._expect(block.mixer, mixed, block.keys)
        masks = [node.args[1] for node in block.mixer.all_input_nodes if node.target is ops.select_padding_mask]
        if masks != ([] if block.keys.is_all else [block.keys]):
            self.fail(f"its padding mask is that of {masks}, its sequence {block.keys}", block.mixer, block)

    def _check_attention(self, block: Block) -> None:
        of_layer = [node for node in self.graph.graph.nodes if self._layer(node) == block.layer]
        kernels = [node for node in of_layer if node.meta.get("attention")]
        stores = [node for node in of_layer if node.target is ops.update_cache]
        if len(kernels) != bool(block.tokens):
            self.fail(f"has {len(kernels)} attention kernels for the queries {block.tokens}", None, block)
        if len(stores) != (block.update is not None):
            self.fail(f"stores its keys and values {len(stores)} times", None, block)
        for store in stores:
            self._expect(store, store.args[1], block.supplies)
            self._expect(store, store.args[2], block.supplies)
        stored = block.update if block.source is None else block.source.update
        for kernel in kernels:
            self._expect(kernel, kernel.args[1], block.tokens)
            for source in kernel.args[2:4]:
                if stored is None:
                    self._expect(kernel, source, block.held)
                elif not _comes_from(source, stored):
                    self.fail(f"reads {source}, which is not what the layer stores or reads", kernel, block)
            self._check_mask(kernel, block)

    def _check_mask(self, kernel: fx.Node, block: Block) -> None:
        mask = kernel.args[4]
        selected = mask.args[0] if isinstance(mask, fx.Node) and mask.target is operator.getitem else None
        if not isinstance(selected, fx.Node) or selected.target is not ops.select_attention_mask:
            if not block.is_whole or self.graph.cached:
                self.fail("its mask is not selected for its queries and keys", kernel, block)
        elif list(selected.args[2:]) != [
            *(block.layer, block.tokens, block.keys),
            *([] if block.held == block.keys else [block.held]),
        ]:
            self.fail(f"its mask is that of {selected.args[2:]}", kernel, block)

    def _layer(self, node: fx.Node) -> int | None:
        relevant = node.meta.get("attention") or node.target is ops.update_cache
        return self.graph.traced.layer_of(node) if relevant else None


def _comes_from(value: object, origin: fx.Node) -> bool:
    """Whether a value is computed from another (an attention with latent keys expands what it stores)."""
    seen, stack = set(), [value]
    while stack:
        node = stack.pop()
        if node is origin:
            return True
        if isinstance(node, fx.Node) and node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return False


def _union(spec: IndexSpec) -> TokenSet:
    result = spec.others[0]
    for held in spec.others[1:]:
        result = result | held
    return result


def check_graph(graph: DecoderGraph) -> None:
    """Raise `PassError` naming the node where the graph is not what the policy asks for."""
    try:
        graph.graph.lint()
    except RuntimeError as error:
        raise PassError("verify", f"the graph is malformed: {error}") from error
    if not graph.has_run("slice_operations"):
        return
    verifier = _Verifier(graph)
    verifier.find_layouts()
    verifier.check_blocks()
    check_stream(graph, verifier.layout)


def _verify(graph: DecoderGraph, report: PassReport) -> None:
    check_graph(graph)


VERIFY = Pass("verify", _verify, optional=False, after=("slice_operations",), repeatable=True)
