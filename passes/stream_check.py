"""Run the residual stream symbolically: does everybody read what it should read?

Each token of each stream value carries the names of the blocks whose writes it has seen. Every block must read each of
its tokens after all earlier writes to it and none other - so frozen tokens are never written and no write is lost - and
so must the output, for the requested rows.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NoReturn

from torch import fx

from dop_compile import ops
from dop_compile.errors import PassError
from dop_compile.passes.graph import DecoderGraph
from dop_compile.tokens import Atom, TokenSet

__all__ = ["check_stream"]

Writes = dict[Atom, tuple[str, ...]]


def check_stream(graph: DecoderGraph, layout: dict[fx.Node, TokenSet]) -> None:
    """Raise `PassError` at the first stale read; `layout` gives the token set of every value that has one."""
    _StreamCheck(graph, layout).check()


class _StreamCheck:
    def __init__(self, graph: DecoderGraph, layout: dict[fx.Node, TokenSet]):
        self.graph = graph
        self.layout = layout
        self.writes: dict[fx.Node, Writes] = {}

    def fail(self, message: str, node: fx.Node) -> NoReturn:
        raise PassError("verify", message, node=node.name, layer=self.graph.traced.layer_of(node))

    def check(self) -> None:
        graph = self.graph
        expected: Writes = dict.fromkeys(graph.universe.atoms, ())
        self._find_writes()
        for junction in graph.junctions:
            for block in junction.blocks:
                roots = [node for node in (block.branch, block.update, block.mixer) if node is not None]
                for reader in [other.attention for other in graph.readers(block) if other.attention is not None]:
                    roots += [node for node in reader.args[2:4] if isinstance(node, fx.Node)]
                known = block.attention.args[2:4] if block.source is not None and block.attention is not None else ()
                self._check_reads(roots, expected, block.reads, f"{block.name}", known=known)
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

    def _sources(self, roots: list[fx.Node], inside: bool = True, known: Collection[object] = ()) -> list[fx.Node]:
        """Stream values that the roots are computed from; `inside`: by way of nodes that belong to a layer.

        `known`: nodes that are not followed, because they are another layer's.
        """
        found: list[fx.Node] = []
        seen = {node for node in known if isinstance(node, fx.Node)}
        stack = list(roots)
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if (node.op == "call_method" and node.target == "size") or node.target is ops.ranked_index:
                continue
            if node in self.writes and node not in roots:
                found.append(node)
            elif node in roots or not inside or self.graph.traced.layer_of(node) is not None:
                stack.extend(node.all_input_nodes)
        return found

    def _check_reads(
        self,
        roots: list[fx.Node],
        expected: Writes,
        tokens: TokenSet,
        reader: str,
        inside: bool = True,
        known: Collection[object] = (),
    ) -> None:
        read: set[Atom] = set()
        for source in self._sources(roots, inside, known):
            if not inside and source is self.graph.entry and expected[self.graph.universe.atoms[0]]:
                continue  # what is before the layers may be used again between them
            for atom, names in self.writes[source].items():
                if names != expected[atom]:
                    last = expected[atom][-1:] or ("the embeddings",)
                    self.fail(f"{reader} reads {atom.group} tokens as they are not after {last[0]}", source)
                read.add(atom)
        if roots and not set(tokens.atoms) <= read:
            self.fail(f"{reader} reads only {sorted(map(str, read))} of the tokens {tokens}", roots[0])
