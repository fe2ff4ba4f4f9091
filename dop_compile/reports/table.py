"""Tables as text, and the words that all of them share."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "EXECUTED_FLOPS",
    "MEASURED",
    "POLICY_FLOPS",
    "PREDICTED",
    "columns",
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
