"""What a compiled model computes for a prompt: tokens, FLOPs and KV bytes per layer, against the original.

Two costs are told apart. *eq. 11* is the policy as written: every operation that it keeps is paid for. *Executed* is
what the compiled graph runs after dead work is removed, read off the token sets of the program's own blocks; it
depends on how many rows of logits are asked for and on whether keys and values are cached.

All counts are per sample and before reduction; FLOPs are of the decoder layers alone (see `dop_compile.costs`). The
original computes every row of every layer, so its eq. 11 FLOPs are also the ones that it executes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dop_compile.compiler import CompiledState
from dop_compile.costs import DecoderDims, LayerTokens, group_counts, kv_cache_bytes, layer_flops, prefill_flops
from dop_compile.explain_table import render
from dop_compile.keep import ANY_GROUP, KeepTable
from dop_compile.passes.graph import MHA, Block
from dop_compile.policy import Policy
from dop_compile.policy_json import integer
from dop_compile.tokens import Atom, TokenSet, Universe
from dop_compile.trace import DecoderInputs

__all__ = ["Explanation", "LayerCost", "TierCost", "executed_flops", "explain"]


@dataclass(frozen=True)
class LayerCost:
    """What one layer computes for one sample: token counts, FLOPs and stored KV bytes.

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
class TierCost:
    """One tier against the original, for one sample; None where the model's sizes are not known."""

    tier: str
    policy: str
    eq11_flops: int | None
    executed_flops: int | None
    original_flops: int | None
    kv_bytes: int | None
    original_kv_bytes: int | None

    @property
    def eq11_ratio(self) -> float | None:
        """FLOPs of the policy as written (eq. 11), as a fraction of the original's."""
        return _ratio(self.eq11_flops, self.original_flops)

    @property
    def executed_ratio(self) -> float | None:
        """FLOPs that run once dead work is removed, as a fraction of the original's."""
        return _ratio(self.executed_flops, self.original_flops)

    @property
    def kv_ratio(self) -> float | None:
        """Bytes of the KV cache after prefill, as a fraction of the original's."""
        return _ratio(self.kv_bytes, self.original_kv_bytes)


@dataclass(frozen=True)
class Explanation:
    """The answer of `explain`; `print` it for a table, or read its fields.

    Args:
        model: class name of the model.
        tier: the tier that `layers` describe.
        system, visual, text: tokens of the sample before reduction.
        entering: visual tokens that enter the decoder.
        rows: last rows of logits asked for; 0 for all.
        layers: one entry per layer.
        tiers: a summary of every tier of the model, in the order of compilation.
        missing: why FLOPs and bytes are not given; "" where they are.
    """

    model: str
    tier: str
    system: int
    visual: int
    text: int
    entering: int
    rows: int
    layers: tuple[LayerCost, ...]
    tiers: tuple[TierCost, ...]
    missing: str = ""

    @property
    def summary(self) -> TierCost:
        """The summary of the tier that `layers` describe."""
        return next(cost for cost in self.tiers if cost.tier == self.tier)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the ratios included."""
        result = dataclasses.asdict(self)
        for entry, cost in zip(result["tiers"], self.tiers, strict=True):
            entry |= {"eq11_ratio": cost.eq11_ratio, "executed_ratio": cost.executed_ratio, "kv_ratio": cost.kv_ratio}
        return result

    def __str__(self) -> str:
        return render(self)


@dataclass(frozen=True)
class _Prompt:
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

    def __init__(self, policy: Policy, prompt: _Prompt):
        entering = group_counts(policy, prompt.system, prompt.visual, prompt.text)
        present = {group: count for group, count in entering.items() if count}
        if not present:
            raise ValueError("system, visual, text: expected at least one token that enters the decoder, got none")
        self.keep = KeepTable.from_policy(policy, tuple(present))
        self.length = sum(present.values())
        self.universe = Universe(self.keep.groups)
        wanted: dict[str, int] = {}
        if 0 < prompt.rows < prompt.total:
            reordered = policy.salient_fraction is not None or present.get("visual", 0) != prompt.visual
            if prompt.visual and prompt.rows > prompt.text and reordered:
                raise ValueError(
                    f"rows: the last {prompt.rows} rows reach into the visual tokens, of which the reducer decides "
                    f"which are left; ask for 1 to {prompt.text} rows, or 0 for all"
                )
            left = prompt.rows
            for group in reversed(present):
                wanted[group] = min(left, present[group])
                left -= wanted[group]
        if self.keep.is_dense:
            present, wanted = {ANY_GROUP: self.length}, {ANY_GROUP: sum(wanted.values())} if wanted else {}
        if wanted:
            self.universe = Universe(self.keep.groups, frozenset(group for group, count in wanted.items() if count))
            self._atoms = {Atom(group, True): wanted[group] for group in present}
            self._atoms |= {Atom(group, False): present[group] - wanted[group] for group in present}
        else:
            self._atoms = {Atom(group, True): count for group, count in present.items()}

    def tokens(self, tokens: TokenSet) -> int:
        return sum(self._atoms[atom] for atom in tokens.atoms)

    def width(self, tokens: TokenSet) -> int:
        """What a matrix product runs over: an empty set is laid out as one position of padding."""
        return max(self.tokens(tokens), 1)


@dataclass
class _Run:
    """One tier's program for one prompt."""

    policy: Policy
    counter: _Counter
    blocks: tuple[Block, ...]
    dims: DecoderDims | None
    dtype_bytes: int

    def layers(self) -> tuple[LayerCost, ...]:
        return tuple(self._layer(number) for number in range(self.policy.num_layers))

    def _layer(self, layer: int) -> LayerCost:
        blocks = [block for block in self.blocks if block.layer == layer]
        mha = next(block for block in blocks if block.kind == MHA)
        mlps = [block for block in blocks if block.kind != MHA]
        none = self.counter.universe.none
        mlp = next((block.tokens for block in mlps), none)
        count = self.counter.tokens
        # Without queries, keys and values are computed only to be cached
        keys = mha.keys if mha.tokens or mha.update is not None else none
        flops = kv_bytes = None
        if self.dims is not None:
            flops = self._mha_flops(self.dims, layer, mha)
            flops += sum(self._mlp_flops(self.dims, layer, block) for block in mlps if block.tokens)
            stored = self.counter.width(mha.keys) if mha.update is not None else 0
            kv_bytes = 2 * stored * self.dims.num_key_value_heads * self.dims.head_dim * self.dtype_bytes
        note = "; ".join(_notes(self.counter.universe, mha, keys, mlp))
        return LayerCost(layer, count(mha.tokens), count(keys), count(mlp), flops, kv_bytes, note)

    def _mha_flops(self, dims: DecoderDims, layer: int, block: Block) -> int:
        if not block.tokens and block.update is None:
            return 0
        queries = self.counter.width(block.tokens) if block.tokens else 0
        keys = self.counter.width(block.keys)
        if not block.fused:
            return layer_flops(dims, LayerTokens(queries, keys, 0), layer)
        # One matrix gives queries, keys and values of every token that is either
        d, d_kv = dims.num_heads * dims.head_dim, dims.num_key_value_heads * dims.head_dim
        projections = 2 * dims.hidden_size * (self.counter.width(block.reads) * (d + 2 * d_kv) + queries * d)
        return projections + 4 * queries * keys * d

    def _mlp_flops(self, dims: DecoderDims, layer: int, block: Block) -> int:
        return layer_flops(dims, LayerTokens(0, 0, self.counter.width(block.tokens)), layer)


def _notes(universe: Universe, mha: Block, keys: TokenSet, mlp: TokenSet) -> list[str]:
    notes = []
    only_requested = not universe.all_requested and (mha.tokens | mlp) <= universe.requested
    for group in universe.groups:
        own = universe.groups_set([group])
        if not universe.all_requested:
            own = (own - universe.requested) or own
        if group in ("text", ANY_GROUP) or own & (mha.tokens | mlp):
            continue
        if not own & keys:
            notes.append(f"{group} absent")
        elif group != "system" or not only_requested:
            notes.append(f"{group} frozen: only keys and values")
    if only_requested:
        notes.append("updates requested rows only")
    if mha.fused:
        notes.append("fused projection: sliced after it")
    return notes


def _ratio(part: int | None, whole: int | None) -> float | None:
    return None if part is None or whole is None else part / whole


def _state(compiled: Any) -> CompiledState:
    state = getattr(compiled, "dop", None)
    if not isinstance(state, CompiledState):
        raise TypeError(f"expected a model returned by dop_compile, got {type(compiled).__name__}")
    return state


def _default_tier(compiled: Any) -> str:
    name: str = compiled.dop_tier
    return name


def _run(state: CompiledState, tier: str, prompt: _Prompt, dims: DecoderDims | None) -> _Run:
    policy = state.tiers[tier]
    counter = _Counter(policy, prompt)
    program = state.program(counter.keep, counter.universe, DecoderInputs(cached=prompt.use_cache))
    dtype: Any = state.decoder.dtype
    return _Run(policy, counter, program.blocks, dims, dtype.itemsize)


def _prompt(system: int, visual: int, text: int, rows: int, use_cache: bool) -> _Prompt:
    counts = [integer(name, n, low=0) for name, n in (("system", system), ("visual", visual), ("text", text))]
    return _Prompt(*counts, integer("rows", rows, low=0), use_cache)


def executed_flops(
    compiled: Any,
    tier: str | None = None,
    *,
    system: int = 35,
    visual: int = 576,
    text: int = 100,
    rows: int = 1,
    use_cache: bool = True,
) -> int:
    """FLOPs of the decoder layers that a compiled model runs for one sample's prompt, after dead work is removed.

    Arguments and errors as in `explain`; ValueError also where the model's sizes cannot be read.
    """
    state = _state(compiled)
    tier = state.check_tier(tier or _default_tier(compiled))
    dims = DecoderDims.from_config(state.base.config)
    layers = _run(state, tier, _prompt(system, visual, text, rows, use_cache), dims).layers()
    return sum(layer.flops for layer in layers if layer.flops is not None)


def explain(
    compiled: Any,
    tier: str | None = None,
    *,
    system: int = 35,
    visual: int = 576,
    text: int = 100,
    rows: int = 1,
    use_cache: bool = True,
) -> Explanation:
    """What a compiled model computes per layer for one sample's prompt, and how that compares with the original.

    Args:
        compiled: a model returned by `dop_compile`; it may be on the meta device.
        tier: the tier whose layers are shown; the model's default if None. Every tier is summed up.
        system, visual, text: tokens of the sample, before reduction.
        rows: how many last rows of logits are asked for, 0 for all; `generate` asks for 1.
        use_cache: whether keys and values are stored.

    Raises:
        TypeError: not a compiled model.
        ValueError: unknown tier, negative counts, or `rows` that reach into reduced visual tokens.
    """
    state = _state(compiled)
    tier = state.check_tier(tier or _default_tier(compiled))
    prompt = _prompt(system, visual, text, rows, use_cache)
    dims, missing = None, ""
    try:
        dims = DecoderDims.from_config(state.base.config)
    except ValueError as error:
        missing = str(error)
    runs = {name: _run(state, name, prompt, dims) for name in state.tiers}
    entering = group_counts(runs[tier].policy, system, visual, text)
    layers = {name: run.layers() for name, run in runs.items()}
    return Explanation(
        model=state.model_class.__name__,
        tier=tier,
        system=system,
        visual=visual,
        text=text,
        entering=sum(count for group, count in entering.items() if group.startswith("visual")),
        rows=min(prompt.rows, prompt.total),
        layers=layers[tier],
        tiers=tuple(_summary(name, run, layers[name], prompt) for name, run in runs.items()),
        missing=missing,
    )


def _summary(tier: str, run: _Run, layers: Sequence[LayerCost], prompt: _Prompt) -> TierCost:
    dims, policy = run.dims, run.policy
    if dims is None:
        return TierCost(tier, repr(policy), None, None, None, None, None)

    def total(field: Callable[[LayerCost], int | None]) -> int:
        return sum(field(layer) or 0 for layer in layers)

    counts = (prompt.system, prompt.visual, prompt.text)
    everything = [LayerTokens(prompt.total, prompt.total, prompt.total)] * dims.num_layers
    return TierCost(
        tier,
        repr(policy),
        eq11_flops=prefill_flops(dims, policy, *counts),
        executed_flops=total(lambda layer: layer.flops),
        original_flops=prefill_flops(dims, Policy.full(dims.num_layers), *counts),
        kv_bytes=total(lambda layer: layer.kv_bytes),
        original_kv_bytes=kv_cache_bytes(dims, everything, run.dtype_bytes) if prompt.use_cache else 0,
    )
