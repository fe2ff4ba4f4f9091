"""Check that a graph is legal and prunes what the keep table prunes, and nothing else.

Requires: any graph; what is checked beyond `graph.lint()` needs `slice_operations` to have run.
Ensures:  the numbered checks below hold, or a `PassError` names the pass, the layer and the node.
Numerics: exact; nothing is changed.

The checks do not trust what passes note about nodes. The token set of every value is found anew from the index tensors
that made it, and the residual stream is executed symbolically: each token of a value carries the writes it has seen.

1. Layout: no operation mixes values of different token sets; slices, merges and additions use the index of their sets.
2. Blocks: each computes for exactly the tokens that the keep table and, after `remove_dead`, liveness give it; one
   attention kernel per layer with queries, of its queries, keys and part of the mask; keys and values of exactly the
   tokens that supply them stored once.
3. Stream: every block reads each of its tokens after all earlier writes to it and none other - so frozen tokens are
   never written, and no write is lost - and so does the output, for the requested rows.
"""

from __future__ import annotations

import operator
from typing import NoReturn

from torch import fx

from dop_compile import ops
from dop_compile.errors import PassError
from dop_compile.passes.graph import MHA, Block, DecoderGraph, IndexSpec
from dop_compile.passes.infra import Pass, PassReport
from dop_compile.passes.remove_dead import find_live
from dop_compile.tokens import Atom, TokenSet
from dop_compile.trace import MASK_BUILDERS

__all__ = ["VERIFY", "check_graph"]

Writes = dict[Atom, tuple[str, ...]]
_WITHOUT_TOKENS = (ops.select_attention_mask, ops.update_cache, *MASK_BUILDERS)
_TOKEN_INPUTS = ("inputs_embeds", "position_ids", "visual_pos_masks")


class _Verifier:
    def __init__(self, graph: DecoderGraph):
        self.graph = graph
        self.layout: dict[fx.Node, TokenSet] = {}
        self.writes: dict[fx.Node, Writes] = {}

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
            return self.graph.universe.all if node.name in _TOKEN_INPUTS else None
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
        graph, universe = self.graph, self.graph.universe
        sets: dict[str, tuple[TokenSet, TokenSet]] = {}
        for block in graph.blocks:
            row = graph.keep.layers[block.layer]
            keys = universe.groups_set(row.key_value) if block.kind == MHA else universe.none
            sets[block.name] = universe.groups_set(row.query if block.kind == MHA else row.mlp), keys
        if graph.has_run("remove_dead"):
            sets = find_live(graph, sets)
        for block in graph.blocks:
            if (block.tokens, block.keys) != sets[block.name]:
                wanted = " with keys ".join(map(str, sets[block.name]))
                self.fail(f"computes {block.tokens} with keys {block.keys}; the policy asks for {wanted}", None, block)
            if (block.branch is None) != (not block.tokens):
                self.fail(f"{block.name} has {'no' if block.tokens else 'a'} branch for {block.tokens}", None, block)
            if block.branch is not None and self.layout.get(block.branch) != block.tokens:
                held = self.layout.get(block.branch)
                self.fail(f"computes the tokens {held} instead of {block.tokens}", block.branch, block)
            if block.kind == MHA:
                self._check_attention(block)

    def _check_attention(self, block: Block) -> None:
        of_layer = [node for node in self.graph.graph.nodes if self._layer(node) == block.layer]
        kernels = [node for node in of_layer if node.meta.get("attention")]
        stores = [node for node in of_layer if node.target is ops.update_cache]
        if len(kernels) != bool(block.tokens):
            self.fail(f"has {len(kernels)} attention kernels for the queries {block.tokens}", None, block)
        if len(stores) != (block.update is not None):
            self.fail(f"stores its keys and values {len(stores)} times", None, block)
        for store in stores:
            self._expect(store, store.args[1], block.keys)
            self._expect(store, store.args[2], block.keys)
        for kernel in kernels:
            self._expect(kernel, kernel.args[1], block.tokens)
            for source in kernel.args[2:4]:
                if not stores:
                    self._expect(kernel, source, block.keys)
                elif not _comes_from(source, stores[0]):
                    self.fail(f"reads {source}, which is not what the layer stores", kernel, block)
            self._check_mask(kernel, block)

    def _check_mask(self, kernel: fx.Node, block: Block) -> None:
        mask = kernel.args[4]
        selected = mask.args[0] if isinstance(mask, fx.Node) and mask.target is operator.getitem else None
        if not isinstance(selected, fx.Node) or selected.target is not ops.select_attention_mask:
            if not block.is_whole or self.graph.cached:
                self.fail("its mask is not selected for its queries and keys", kernel, block)
        elif list(selected.args[2:]) != [block.layer, block.tokens, block.keys]:
            self.fail(f"its mask is that of {selected.args[2:]}", kernel, block)

    def _layer(self, node: fx.Node) -> int | None:
        relevant = node.meta.get("attention") or node.target is ops.update_cache
        return self.graph.traced.layer_of(node) if relevant else None

    # --- 3. stream ------------------------------------------------------------------------------------------------

    def check_stream(self) -> None:
        graph = self.graph
        expected: Writes = dict.fromkeys(graph.universe.atoms, ())
        self._find_writes()
        for junction in graph.junctions:
            for block in junction.blocks:
                roots = [node for node in (block.branch, block.update) if node is not None]
                self._check_reads(roots, expected, block.reads, f"{block.name}")
            if not junction.blocks:
                self._check_reads([junction.out], expected, graph.universe.all, junction.out.name, inside=False)
                expected = {atom: (*names, junction.out.name) for atom, names in expected.items()}
            for block in junction.blocks:
                for atom in block.tokens.atoms:
                    expected[atom] = (*expected[atom], block.name)
        self._check_reads([graph.output], expected, graph.output_tokens, "the output", inside=False)

    def _find_writes(self) -> None:
        """The writes that each token of each stream value has seen."""
        graph, writes, entry = self.graph, self.writes, self.graph.entry
        assert entry is not None
        owner = {block.branch: block.name for block in graph.blocks if block.branch is not None}
        whole = {j.out: j for j in graph.junctions if j.out is not j.stream and "written" not in j.out.meta}
        for node in graph.graph.nodes:
            if node is entry:
                writes[entry] = dict.fromkeys(graph.universe.atoms, ())
            elif node in whole:
                names = [block.name for block in whole[node].blocks] or [node.name]
                sources = self._sources([node], inside=False)
                stream = max(sources, key=lambda source: sum(map(len, writes[source].values())))
                writes[node] = {atom: (*seen, *names) for atom, seen in writes[stream].items()}
            elif node.target in (ops.token_slice, ops.token_merge):
                parts = [writes[source] for source in node.all_input_nodes if source in writes]
                if parts:
                    seen = {atom: names for part in parts for atom, names in part.items()}
                    writes[node] = {atom: seen[atom] for atom in self.layout[node].atoms if atom in seen}
            elif "written" in node.meta and node.args[0] in writes:
                stream, branch = node.args[:2]
                name, written, before = owner.get(branch, str(branch)), self.layout[branch], writes[stream]
                writes[node] = {a: (*names, name) if a in written.atoms else names for a, names in before.items()}

    def _sources(self, roots: list[fx.Node], inside: bool = True) -> list[fx.Node]:
        """Stream values that the roots are computed from; `inside`: by way of nodes that belong to a layer."""
        found: list[fx.Node] = []
        seen: set[fx.Node] = set()
        stack = list(roots)
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self.writes and node not in roots:
                found.append(node)
            elif node in roots or not inside or self.graph.traced.layer_of(node) is not None:
                stack.extend(node.all_input_nodes)
        return found

    def _check_reads(
        self, roots: list[fx.Node], expected: Writes, tokens: TokenSet, reader: str, inside: bool = True
    ) -> None:
        read: set[Atom] = set()
        for source in self._sources(roots, inside):
            if not inside and source is self.graph.entry and expected[self.graph.universe.atoms[0]]:
                continue  # what is before the layers may be used again between them
            for atom, names in self.writes[source].items():
                if names != expected[atom]:
                    last = expected[atom][-1:] or ("the embeddings",)
                    self.fail(f"{reader} reads {atom.group} tokens as they are not after {last[0]}", source)
                read.add(atom)
        if roots and not set(tokens.atoms) <= read:
            self.fail(f"{reader} reads only {sorted(map(str, read))} of the tokens {tokens}", roots[0])


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
    verifier.check_stream()


def _verify(graph: DecoderGraph, report: PassReport) -> None:
    check_graph(graph)


VERIFY = Pass("verify", _verify, optional=False, after=("slice_operations",), repeatable=True)
