"""An `Explanation` as text, and the words that all tables share."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dop_compile.reports.explain import Explanation, LayerCost, TierCost

__all__ = [
    "EXECUTED_FLOPS",
    "MEASURED",
    "POLICY_FLOPS",
    "PREDICTED",
    "columns",
    "render",
    "show_bytes",
    "show_flops",
    "show_percent",
]

POLICY_FLOPS, EXECUTED_FLOPS = "policy FLOPs", "executed FLOPs"
"""Of a decoder's prefill: each operation that the policy keeps (DOP eq. 11), and what the compiled program computes."""
PREDICTED, MEASURED = "predicted divergence", "measured divergence"
"""A sum of curves that were measured one axis at a time, and that of a policy which was run as a whole."""


def show_flops(flops: float | None) -> str:
    return "-" if flops is None else _scaled(flops, 1000, ("FLOPs", "kFLOPs", "MFLOPs", "GFLOPs", "TFLOPs", "PFLOPs"))


def show_bytes(count: float | None) -> str:
    return "-" if count is None else _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def show_percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100 * ratio:.1f} %"


def _scaled(value: float, step: int, units: Sequence[str]) -> str:
    power = 0
    while value >= step and power < len(units) - 1:
        value, power = value / step, power + 1
    return f"{value:.0f} {units[power]}" if power == 0 or value >= 100 else f"{value:.3g} {units[power]}"


def columns(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Lines of a table whose first row is its head; columns are right-aligned but those in `left`."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def render(explanation: Explanation) -> str:
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
