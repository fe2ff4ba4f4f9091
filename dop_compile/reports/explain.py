"""What a compiled model computes for a prompt: tokens, FLOPs and KV bytes per layer, against the original.

Two costs are told apart. *Policy FLOPs* are eq. 11 of the policy: every operation that it keeps is paid for. *Executed
FLOPs* are what the compiled graph runs after dead work is removed, read off the token sets of the program's own blocks;
they depend on how many rows of logits are asked for and on whether keys and values are cached.

All counts are per sample and before reduction; FLOPs are of the decoder layers alone (see
`dop_compile.policy.costs`). The original computes every row of every layer, so its policy FLOPs are also those that it
executes.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dop_compile.checks import integer
from dop_compile.compiler import CompiledState
from dop_compile.hf.dimensions import DecoderDims
from dop_compile.policy.costs import LayerTokens, group_counts, kv_cache_bytes, prefill_flops
from dop_compile.policy.policy import Policy
from dop_compile.reports.counts import PromptCounts, assumed_counts
from dop_compile.reports.executed import LayerCost, SampleTokens, layer_costs
from dop_compile.reports.table import EXECUTED_FLOPS, POLICY_FLOPS, columns, show_bytes, show_flops, show_percent

__all__ = ["Explanation", "LayerCost", "TierCost", "executed_flops", "explain"]


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
        """Policy FLOPs (eq. 11) as a fraction of the original's."""
        return _ratio(self.eq11_flops, self.original_flops)

    @property
    def executed_ratio(self) -> float | None:
        """Executed FLOPs, those that run once dead work is removed, as a fraction of the original's."""
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
        counts: which of the prompt's tokens were not given, and how their number is known; "" if all were given.
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
    counts: str = ""

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
        return _render(self)

    def _repr_html_(self) -> str:
        """The table as notebooks show it."""
        return f"<pre>{html.escape(str(self))}</pre>"


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


def _prompt(counts: PromptCounts, rows: int, use_cache: bool) -> SampleTokens:
    return SampleTokens(
        integer("system", counts.system, low=0),
        integer("visual", counts.visual, low=0),
        integer("text", counts.text, low=0),
        integer("rows", rows, low=0),
        use_cache,
    )


def executed_flops(
    compiled: Any,
    tier: str | None = None,
    *,
    system: int | None = None,
    visual: int | None = None,
    text: int | None = None,
    rows: int = 1,
    use_cache: bool = True,
) -> int:
    """Executed FLOPs: what a compiled model's decoder layers run for one sample's prompt, dead work removed.

    Arguments and errors as in `explain`; ValueError also where the model's sizes cannot be read.
    """
    state = _state(compiled)
    tier = state.check_tier(tier or _default_tier(compiled))
    dims = DecoderDims.from_config(state.base.config)
    counts = assumed_counts(state.base.config, {tier: state.tiers[tier]}, system, visual, text)
    layers = layer_costs(state, tier, _prompt(counts, rows, use_cache), dims)
    return sum(layer.flops for layer in layers if layer.flops is not None)


def explain(
    compiled: Any,
    tier: str | None = None,
    *,
    system: int | None = None,
    visual: int | None = None,
    text: int | None = None,
    rows: int = 1,
    use_cache: bool = True,
) -> Explanation:
    """What a compiled model computes per layer for one sample's prompt, and how that compares with the original.

    Args:
        compiled: a model returned by `dop_compile`; it may be on the meta device.
        tier: the tier whose layers are shown; the model's default if None. Every tier is summed up.
        system, visual, text: tokens of the sample, before reduction; without visual tokens all of it is text. None:
            those of one picture by the model's configuration, 35 and 100 (`dop_compile.reports.counts`).
        rows: how many last rows of logits are asked for, 0 for all; `generate` asks for 1.
        use_cache: whether keys and values are stored.

    Raises:
        TypeError: not a compiled model.
        ValueError: unknown tier, negative counts, or `rows` that reach into reduced visual tokens; `visual` is not
            given and depends on the picture, or is less than a tier's `visual_tokens`.
    """
    state = _state(compiled)
    tier = state.check_tier(tier or _default_tier(compiled))
    counts = assumed_counts(state.base.config, state.tiers, system, visual, text)
    prompt = _prompt(counts, rows, use_cache)
    dims, missing = None, ""
    try:
        dims = DecoderDims.from_config(state.base.config)
    except ValueError as error:
        missing = str(error)
    entering = group_counts(state.tiers[tier], prompt.system, prompt.visual, prompt.text)
    layers = {name: layer_costs(state, name, prompt, dims) for name in state.tiers}
    return Explanation(
        model=state.model_class.__name__,
        tier=tier,
        system=prompt.system,
        visual=prompt.visual,
        text=prompt.text,
        entering=sum(count for group, count in entering.items() if group.startswith("visual")),
        rows=min(prompt.rows, prompt.total),
        layers=layers[tier],
        tiers=tuple(_summary(state, name, costs, prompt, dims) for name, costs in layers.items()),
        missing=missing,
        counts=counts.why,
    )


def _summary(
    state: CompiledState, tier: str, layers: Sequence[LayerCost], prompt: SampleTokens, dims: DecoderDims | None
) -> TierCost:
    policy = state.tiers[tier]
    if dims is None:
        return TierCost(tier, repr(policy), None, None, None, None, None)

    def total(field: Callable[[LayerCost], int | None]) -> int:
        return sum(field(layer) or 0 for layer in layers)

    counts = (prompt.system, prompt.visual, prompt.text)
    dtype: Any = state.decoder.dtype
    everything = [LayerTokens(prompt.total, prompt.total, prompt.total)] * dims.num_layers
    return TierCost(
        tier,
        repr(policy),
        eq11_flops=prefill_flops(dims, policy, *counts),
        executed_flops=total(lambda layer: layer.flops),
        original_flops=prefill_flops(dims, Policy.full(dims.num_layers), *counts),
        kv_bytes=total(lambda layer: layer.kv_bytes),
        original_kv_bytes=kv_cache_bytes(dims, everything, dtype.itemsize) if prompt.use_cache else 0,
    )


def _render(explanation: Explanation) -> str:
    """A head line, a table of the layers (equal neighbours in one row), and the tiers against the original."""
    e = explanation
    visual = f"{e.visual} visual" + ("" if e.entering == e.visual else f" ({e.entering} enter)")
    rows = "all logits" if e.rows == 0 else f"logits of the last {e.rows}"
    head = f"{e.model}, tier {e.tier!r}: {e.system} system + {visual} + {e.text} text tokens, {rows}"
    parts = [[head, *([f"({e.counts})"] if e.counts else []), e.summary.policy], _layers(e.layers), _tiers(e.tiers)]
    if e.missing:
        parts.append([f"FLOPs and bytes are not given: {e.missing}"])
    return "\n\n".join("\n".join(lines) for lines in parts)


def _layers(layers: Sequence[LayerCost]) -> list[str]:
    rows = [["layer", "queries", "keys/values", "MLP", EXECUTED_FLOPS, "KV cache", "note"]]

    def content(c: LayerCost) -> tuple[object, ...]:
        return (c.query, c.key_value, c.mlp, c.flops, c.kv_bytes, c.note)

    for _, group in itertools.groupby(layers, content):
        first, *others = group
        name = f"{first.layer}-{others[-1].layer}" if others else str(first.layer)
        tokens = [str(count) for count in (first.query, first.key_value, first.mlp)]
        rows.append([name, *tokens, show_flops(first.flops), show_bytes(first.kv_bytes), first.note])
    return columns(rows, left=(0, 6))


def _tiers(tiers: Sequence[TierCost]) -> list[str]:
    rows = [["tier", POLICY_FLOPS, "of original", EXECUTED_FLOPS, "of original", "KV cache", "of original"]]
    for cost in tiers:
        flops = [show_flops(cost.eq11_flops), show_percent(cost.eq11_ratio)]
        executed = [show_flops(cost.executed_flops), show_percent(cost.executed_ratio)]
        rows.append([cost.tier, *flops, *executed, show_bytes(cost.kv_bytes), show_percent(cost.kv_ratio)])
    whole = show_flops(tiers[0].original_flops)
    rows.append(["original", whole, "", whole, "", show_bytes(tiers[0].original_kv_bytes), ""])
    return columns(rows)
