"""Carry only the tokens that are still needed: narrow the residual stream, set aside tokens that no longer change.

Requires: blocks sliced to their sets; the stream itself still holds every token.
Ensures:  after the last operation that changes a token, it leaves the stream: for good if nobody reads it again, else
          into a *frozen* stream of its own (visual tokens that only supply keys and values).
Numerics: exact; tokens are only moved.

    before   x1 = token_add(x0, u, Q);  y = token_slice(x1, Q | K)
    after    a0 = token_slice(x0, Q);   f = token_slice(x0, K - Q);   a1 = a0 + u;   y = token_merge(a1, f)

Cases: 1. tokens nobody reads again are dropped where they were last read; 2. tokens that two or more blocks still
read become a frozen stream, which is computed once; 3. tokens read once more stay until then (splitting costs more
than it saves); 4. requested rows of frozen tokens are merged back at the end.  Kept: 5. everything up to the last
transform of the stream, which needs all tokens.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass

from torch import fx

from dop_compile import ops
from dop_compile.passes.blocks import Junction
from dop_compile.passes.cleanup import eliminate_dead_nodes
from dop_compile.passes.graph import DecoderGraph
from dop_compile.passes.infra import Pass
from dop_compile.passes.report import PassReport
from dop_compile.tokens import Atom, TokenSet

__all__ = ["NARROW_RESIDUAL"]


@dataclass
class _Streams:
    """What holds the tokens between two blocks: the active stream first, then the frozen ones."""

    parts: list[tuple[TokenSet, fx.Node]]

    @property
    def active(self) -> tuple[TokenSet, fx.Node]:
        return self.parts[0]


class _Schedule:
    """When each atom is last changed and how often it is read after that, by position of the junction."""

    def __init__(self, graph: DecoderGraph):
        self.universe = graph.universe
        self.count = len(graph.junctions)
        self.last_write = dict.fromkeys(graph.universe.atoms, -1)
        self.reads: dict[Atom, list[int]] = {atom: [] for atom in graph.universe.atoms}
        for number, junction in enumerate(graph.junctions):
            for atom in self.last_write:
                if junction.writes is None or atom in junction.writes.atoms:
                    self.last_write[atom] = number
                if junction.reads is None or atom in junction.reads.atoms:
                    self.reads[atom].append(number)
        for atom in graph.universe.requested.atoms:
            self.reads[atom].append(self.count)
        self.stages = graph.stages
        if self.stages.reads_stream:
            for stage, number in enumerate(self.stages.junctions):
                for atom in self.stages.read_from_stream(stage).atoms:
                    self.reads[atom].append(number + 1)

    def _later_reads(self, atom: Atom, number: int) -> int:
        return sum(read >= number for read in self.reads[atom])

    def is_active(self, atom: Atom, number: int) -> bool:
        """Whether the active stream must hold the atom right before junction `number`."""
        if self.last_write[atom] >= number:
            return True
        # Once it can no longer change it is frozen, unless so few reads are left that it had better stay to the end
        frozen_from = self.last_write[atom] + 1
        return self._later_reads(atom, number) > 0 and self._later_reads(atom, frozen_from) < 2

    def active(self, number: int) -> TokenSet:
        atoms = frozenset(a for a in self.universe.atoms if self.is_active(a, number))
        return self.stages.close(TokenSet(atoms, self.universe), number, behind=True)

    def needed(self, number: int) -> TokenSet:
        atoms = (a for a in self.universe.atoms if self._later_reads(a, number) or self.last_write[a] >= number)
        return self.stages.close(TokenSet(frozenset(atoms), self.universe), number, behind=True)


class _Narrowing:
    """Copies the graph node by node, with every stream value replaced by the parts that are still needed."""

    def __init__(self, graph: DecoderGraph):
        self.graph = graph
        self.schedule = _Schedule(graph)
        self.everything = graph.universe.all
        self.old = graph.graph
        self.new: dict[fx.Node, fx.Node] = {}
        self.streams: dict[fx.Node, _Streams] = {}
        # A junction that adds nothing has its stream as its output: what follows reads as before it
        self.steps = {j.out: number for number, j in enumerate(graph.junctions) if j.out is not j.stream}
        self.partial = {
            node: number for number, junction in enumerate(graph.junctions) for node in _additions(junction)
        }
        self.tail = _ancestors(graph.output)
        self.splits = 0

    def run(self) -> None:
        graph = self.graph
        old_indices = {node: spec for spec, node in graph.indices.items()}
        graph.traced.graph = fx.Graph()
        graph.indices = {}
        last, entry = graph.junctions[-1].out, graph.entry
        assert entry is not None
        for node in self.old.nodes:
            spec = old_indices.get(node)
            if spec is not None:
                self.new[node] = graph.index(spec.kind, spec.tokens, *spec.others)
            elif node in self.partial:
                self._add(node, self.partial[node])
            elif node.target is ops.token_slice and node.args[0] in self.streams and "source" in node.meta:
                self.new[node] = self._read(self.streams[node.args[0]], node.meta["tokens"])
            else:
                self.new[node] = graph.graph.node_copy(node, functools.partial(self._argument, user=node, last=last))
            if node.target is ops.rank_tokens:
                graph.rank_nodes[node.args[1]] = self.new[node]
            if node is entry:
                self.streams[entry] = self._split(_Streams([(self.everything, self.new[entry])]), 0)
            elif node in self.steps and node not in self.streams:
                held = _Streams([(self.everything, self.new[node])])
                self.streams[node] = self._split(held, self.steps[node] + 1)
        self._update_junctions()
        for spec in [spec for spec, node in graph.indices.items() if not node.users]:
            graph.graph.erase_node(graph.indices.pop(spec))
        eliminate_dead_nodes(graph.graph)

    def _update_junctions(self) -> None:
        """Junctions and blocks name nodes of the new graph from here on."""
        if self.graph.entry is not None:
            self.graph.entry = self.new[self.graph.entry]
        for junction in self.graph.junctions:
            junction.stream, junction.out = self.new[junction.stream], self.new[junction.out]
            for block in junction.blocks:
                block.branch = None if block.branch is None else self.new[block.branch]
                block.attention = None if block.attention is None else self.new[block.attention]
                block.update = None if block.update is None else self.new[block.update]
                block.mixer = None if block.mixer is None else self.new[block.mixer]
                block.nodes = tuple(self.new[node] for node in block.nodes if node in self.new)

    def _argument(self, node: fx.Node, user: fx.Node, last: fx.Node) -> fx.Node:
        """What an ordinary node reads in place of a stream value."""
        outside = self.graph.traced.layer_of(user) is None
        whole_size = user.op == "call_method" and user.target == "size"  # a layer's own are asked of what it works on
        # Where nothing is left to add, the last stream is an earlier one, which layers read for keys and values too
        if node is last and outside and user in self.tail:
            return self._read(self.streams[node], self.graph.universe.requested)
        if node not in self.streams or (node is self.graph.entry and (outside or whole_size)):
            return self.new[node]  # masks and rotary tables take the embeddings as they came
        return self._read(self.streams[node], self.everything)

    def _add(self, node: fx.Node, number: int) -> None:
        """One addition of a sliced branch: to the tokens that stay, before or after the others leave."""
        stream, branch = node.args[0], self.new[node.args[1]]  # type: ignore[index]
        streams = self.streams[stream]  # type: ignore[index]
        written: TokenSet = node.meta["written"]
        all_written = self.graph.junctions[number].writes
        if all_written is not None and all_written <= self.schedule.active(number + 1):
            streams = self._split(streams, number + 1)
        held, active = streams.active
        graph = self.graph
        if written == held:
            out = graph.call(operator.add, (active, branch), name=node.name)
        else:
            index = graph.index("scatter", written, held)
            out = graph.call(ops.token_add, (active, branch, index), name=node.name)
        out.meta = {**node.meta, "tokens": held}
        self.new[node] = out
        streams = _Streams([(held, out), *streams.parts[1:]])
        is_last = node in self.steps
        self.streams[node] = self._split(streams, number + 1) if is_last else streams

    def _read(self, streams: _Streams, tokens: TokenSet) -> fx.Node:
        """The tokens of the set, in one tensor, from wherever they are."""
        for held, node in streams.parts:
            if tokens <= held:
                return self.graph.slice(node, tokens, held)
        sources = [(held, node) for held, node in streams.parts if held & tokens]
        index = self.graph.index("merge", tokens, *(held for held, _ in sources))
        nodes = tuple(node for _, node in sources)
        for user in nodes[0].users:
            if user.target is ops.token_merge and user.args == (index, *nodes):
                return user
        sets = {"tokens": tokens, "sources": tuple(held for held, _ in sources)}
        return self.graph.call(ops.token_merge, (index, *nodes), name=f"{nodes[0].name}_merge", like=nodes[0], **sets)

    def _split(self, streams: _Streams, number: int) -> _Streams:
        """The streams right before junction `number`: what is no longer active leaves the active stream."""
        (held, node), frozen = streams.active, streams.parts[1:]
        active, needed = self.schedule.active(number), self.schedule.needed(number)
        leaving = (held - active) & needed
        if active != held or any(not part[0] & needed for part in frozen):
            self.splits += 1
        parts = [(active & held, self.graph.slice(node, active & held, held))]
        if leaving:
            parts.append((leaving, self.graph.slice(node, leaving, held, f"frozen_{leaving}", frozen=True)))
        return _Streams(parts + [part for part in frozen if part[0] & needed])


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                stack.append(source)
    return found


def _additions(junction: Junction) -> list[fx.Node]:
    """The additions of a sliced junction, first to last; none if it was left as traced."""
    additions = []
    node = junction.out
    while "written" in node.meta and node is not junction.stream:
        additions.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return additions


def _narrow_residual(graph: DecoderGraph, report: PassReport) -> None:
    narrowing = _Narrowing(graph)
    narrowing.run()
    graph.output_tokens = graph.universe.requested
    report.rewritten = narrowing.splits


NARROW_RESIDUAL = Pass("narrow_residual", _narrow_residual, after=("slice_operations",), before=("share_frozen",))
