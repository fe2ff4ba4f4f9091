"""What one compiled program runs for one sample: token counts, FLOPs and KV bytes per layer.

Everything is read off the token sets that the program's own blocks have after the pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dop_compile.compiler import CompiledState
from dop_compile.hf.dimensions import DecoderDims
from dop_compile.passes.blocks import MHA, Block
from dop_compile.policy.costs import LayerTokens, attention_flops, group_counts, layer_flops, state_bytes
from dop_compile.policy.keep import ANY_GROUP, KeepTable
from dop_compile.policy.policy import Policy
from dop_compile.rankings import criterion
from dop_compile.tokens import Atom, TokenSet, Universe
from dop_compile.tracing.side_inputs import default_inputs

__all__ = ["LayerCost", "SampleTokens", "group_tokens", "layer_costs", "resumed_flops"]


@dataclass(frozen=True)
class LayerCost:
    """What one layer computes for one sample: token counts, executed FLOPs and stored KV bytes.

    `flops` and `kv_bytes` are None where the model's sizes are not known (`Explanation.missing` says why).
    """

    layer: int
    query: int
    key_value: int
    mlp: int
    flops: int | None
    kv_bytes: int | None
    note: str = ""


@dataclass(frozen=True)
class SampleTokens:
    """One sample: tokens before reduction, last rows of logits asked for (0 for all), and whether it is cached."""

    system: int
    visual: int
    text: int
    rows: int
    use_cache: bool

    @property
    def total(self) -> int:
        return self.system + self.visual + self.text


class _Counter:
    """Widths of token sets for one sample."""

    def __init__(self, policy: Policy, prompt: SampleTokens):
        entering = group_counts(policy, prompt.system, prompt.visual, prompt.text)
        # As in a call: the program is the same, however many tokens leave at a stage
        ranked = policy.ranking.groups if policy.ranking is not None and prompt.visual else ()
        present = {group: count for group, count in entering.items() if count or group in ranked}
        self.present = present
        if not present:
            raise ValueError("system, visual, text: expected at least one token that enters the decoder, got none")
        self.keep = KeepTable.from_policy(policy, tuple(present))
        self.length = sum(present.values())
        self.universe = Universe(self.keep.groups)
        wanted: dict[str, int] = {}
        if 0 < prompt.rows < prompt.total:
            split = policy.salient_fraction is not None or policy.ranking is not None
            reordered = split or present.get("visual", 0) != prompt.visual
            if prompt.visual and prompt.rows > prompt.text and reordered:
                raise ValueError(
                    f"rows: the last {prompt.rows} rows reach into the visual tokens, of which the reducer decides "
                    f"which are left; ask for 1 to {prompt.text} rows, or 0 for all"
                )
            left = prompt.rows
            for group in reversed(present):
                wanted[group] = min(left, present[group])
                left -= wanted[group]
        dense = self.keep.is_dense
        if wanted:
            asked = frozenset(group for group, count in wanted.items() if count)
            self.universe = Universe(self.keep.groups, frozenset({ANY_GROUP}) if dense else asked)
        # Of each atom, the groups that it holds: all of them where the program tells none apart
        self._atoms: dict[Atom, dict[str, int]] = {}
        for group, count in present.items():
            requested = wanted[group] if wanted else count
            for flag, part in ((True, requested), (False, count - requested)):
                self._atoms.setdefault(Atom(ANY_GROUP if dense else group, flag), {})[group] = part

    def tokens(self, tokens: TokenSet) -> int:
        return sum(sum(self._atoms[atom].values()) for atom in tokens.atoms)

    def by_group(self, tokens: TokenSet) -> dict[str, int]:
        found: dict[str, int] = {}
        for atom in tokens.atoms:
            for group, count in self._atoms[atom].items():
                found[group] = found.get(group, 0) + count
        return found

    def width(self, tokens: TokenSet) -> int:
        """What a matrix product runs over: an empty set is laid out as one position of padding."""
        return max(self.tokens(tokens), 1)


@dataclass
class _Run:
    """One program for one prompt."""

    counter: _Counter
    blocks: tuple[Block, ...]
    dims: DecoderDims | None
    dtype_bytes: int
    cached: bool

    def flops(self) -> int:
        """Of all layers."""
        return sum(self.layer(number).flops or 0 for number in sorted({block.layer for block in self.blocks}))

    def _split(self, layer: int) -> tuple[list[Block], list[Block]]:
        """The blocks of a layer that mix tokens, its attention first, and the others."""
        blocks = [block for block in self.blocks if block.layer == layer]
        mixing = sorted((block for block in blocks if block.kind == MHA), key=lambda block: block.mixes)
        return mixing, [block for block in blocks if block.kind != MHA]

    def parts(self, layer: int) -> tuple[TokenSet, TokenSet, TokenSet]:
        """The tokens of a layer that are queries, keys and values, and in the MLP."""
        mixing, mlps = self._split(layer)
        none = self.counter.universe.none
        mlp = next((block.tokens for block in mlps), none)
        if not mixing:
            return none, none, mlp
        first = mixing[0]
        keys = first.keys | first.supplies if self._has_keys(first) else none
        return first.tokens, keys, mlp

    def _has_keys(self, block: Block) -> bool:
        """Whether keys and values are there: without queries, only for the cache and for layers that read them too."""
        read = any(other.source is block and other.tokens for other in self.blocks)
        return bool(block.tokens) or read or block.update is not None or block.mixer is not None

    def layer(self, layer: int) -> LayerCost:
        mixing, mlps = self._split(layer)
        queries, keys, mlp = self.parts(layer)
        count = self.counter.tokens
        flops = kv_bytes = None
        if self.dims is not None:
            flops = sum(self._mixing_flops(self.dims, layer, block) for block in mixing)
            flops += sum(self._mlp_flops(self.dims, layer, block) for block in mlps if block.tokens)
            flops += sum(self._ranking_flops(self.dims, layer, block) for block in mixing if block.attends)
            stored = sum(self.counter.width(block.supplies) for block in mixing if block.update is not None)
            kv_bytes = 2 * stored * self.dims.key_value_width(layer) * self.dtype_bytes
            if self.cached and any(block.mixer is not None for block in mixing):
                kv_bytes += state_bytes(self.dims, layer, self.dtype_bytes)
        notes = _notes(self.counter.universe, queries, keys, mlp, mixing)
        if (stage := self._stage(layer)) is not None:
            left = sum(self.counter.present[g] for g in ("visual", *self._later(stage)) if g in self.counter.present)
            notes.insert(0, f"{left} of the visual tokens stay, ranked here")
        note = "; ".join(notes)
        return LayerCost(layer, count(queries), count(keys), count(mlp), flops, kv_bytes, note)

    def _mixing_flops(self, dims: DecoderDims, layer: int, block: Block) -> int:
        if block.mixes:
            return 0 if block.mixer is None else self.counter.width(block.keys) * dims.mixer_flops[layer]
        if not self._has_keys(block):
            return 0
        queries = self.counter.width(block.tokens) if block.tokens else 0
        keys, supplied = self.counter.width(block.held), self.counter.width(block.supplies)
        if not block.fused:
            return attention_flops(dims, layer, queries, keys, supplied)
        # One matrix gives queries, keys and values of every token that is either
        d, d_kv = dims.query_width(layer), dims.key_value_width(layer)
        projections = 2 * dims.hidden_size * (self.counter.width(block.reads) * (d + 2 * d_kv) + queries * d)
        return projections + 4 * queries * keys * d

    def _stage(self, layer: int) -> int | None:
        """The number of the ranking stage at a layer."""
        ranking = self.counter.keep.ranking
        layers = [] if ranking is None else [stage.layer for stage in ranking.stages]
        return layers.index(layer) if layer in layers else None

    def _later(self, stage: int) -> tuple[str, ...]:
        """The groups that leave at later stages."""
        ranking = self.counter.keep.ranking
        return () if ranking is None else ranking.groups[stage + 1 :]

    def _ranking_flops(self, dims: DecoderDims, layer: int, block: Block) -> int:
        """What a ranking computes again: attention rows of the last token, of the text, or of the picture as well.

        One that reads the next layer projects its queries and keys too.
        """
        ranking, stage = self.counter.keep.ranking, self._stage(layer)
        if ranking is None or stage is None or ranking.criterion == "pivots":
            return 0
        ranks = criterion(ranking.criterion, dict(ranking.options))
        queries, keys, projections = block.tokens, block.keys, 0
        if ranks.reads_next:
            row = self.counter.keep.layers[layer + 1]
            queries, keys = self._before_leaving(row.query, stage), self._before_leaving(row.key_value, stage)
            query, key = dims.query_width(layer + 1), dims.key_value_width(layer + 1)
            projections = 2 * dims.hidden_size * (self.counter.width(queries) * query + self.counter.width(keys) * key)
        groups = {g for g in self.counter.universe.groups for rater in ranks.raters if g.startswith(rater)}
        rows = self.counter.tokens(self.counter.universe.groups_set(groups) & queries)
        rows = 1 if ranking.criterion == "last_token" else rows
        width = dims.query_width(layer + ranks.reads_next)
        return projections + 4 * rows * self.counter.width(keys) * width

    def _before_leaving(self, groups: frozenset[str], stage: int) -> TokenSet:
        """Groups of the layer after a stage, with the tokens that leave there."""
        ranking = self.counter.keep.ranking
        assert ranking is not None
        leaving = {ranking.stages[stage].group} if groups & {"visual", *self._later(stage)} else set()
        return self.counter.universe.groups_set(groups | leaving)

    def _mlp_flops(self, dims: DecoderDims, layer: int, block: Block) -> int:
        return layer_flops(dims, LayerTokens(0, 0, self.counter.width(block.tokens)), layer)


def _notes(universe: Universe, queries: TokenSet, keys: TokenSet, mlp: TokenSet, mixing: list[Block]) -> list[str]:
    notes = []
    held = "in the state" if mixing and mixing[0].mixes else "keys and values"
    only_requested = not universe.all_requested and (queries | mlp) <= universe.requested
    for group in universe.groups:
        own = universe.groups_set([group])
        if not universe.all_requested:
            own = (own - universe.requested) or own
        ranked = group.startswith("visual_until_")  # they leave where they are ranked
        if ranked or group in ("text", ANY_GROUP) or own & (queries | mlp):
            continue
        if not own & keys:
            notes.append(f"{group} absent")
        elif group != "system" or not only_requested:
            notes.append(f"{group} frozen: only {held}")
    if only_requested:
        notes.append("updates requested rows only")
    notes += [
        f"reads the keys and values of layer {block.source.layer}" for block in mixing if block.source is not None
    ]
    if any(block.fused for block in mixing):
        notes.append("fused projection: sliced after it")
    return notes


def layer_costs(
    state: CompiledState, tier: str, prompt: SampleTokens, dims: DecoderDims | None
) -> tuple[LayerCost, ...]:
    """What a tier runs for a prompt, per layer; without `dims` only tokens are counted.

    Raises:
        ValueError: no token enters the decoder, or `rows` reach into visual tokens that the reducer picks.
    """
    policy = state.tiers[tier]
    run = _run(state, policy, prompt, dims)
    return tuple(run.layer(number) for number in range(policy.num_layers))


def group_tokens(state: CompiledState, tier: str, prompt: SampleTokens) -> tuple[tuple[dict[str, int], ...], ...]:
    """Per layer and module (queries, keys and values, MLP), the tokens that a tier runs, by group.

    Raises:
        ValueError: as `layer_costs`.
    """
    policy = state.tiers[tier]
    run = _run(state, policy, prompt, None)
    return tuple(tuple(map(run.counter.by_group, run.parts(number))) for number in range(policy.num_layers))


def resumed_flops(
    state: CompiledState, policy: Policy, prompt: SampleTokens, dims: DecoderDims, first_layer: int = 0
) -> int:
    """FLOPs that a run of `policy` computes for one sample from `first_layer` on."""
    return _run(state, policy, prompt, dims, first_layer).flops()


def _run(
    state: CompiledState, policy: Policy, prompt: SampleTokens, dims: DecoderDims | None, first_layer: int = 0
) -> _Run:
    counter = _Counter(policy, prompt)
    state.follow_changes()
    inputs = default_inputs(state.decoder, cached=prompt.use_cache, first_layer=first_layer)
    program = state.program(counter.keep, counter.universe, inputs)
    dtype: Any = state.decoder.dtype
    return _Run(counter, program.blocks, dims, dtype.itemsize, prompt.use_cache)
