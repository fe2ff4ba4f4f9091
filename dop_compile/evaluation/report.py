"""A comparison as a Markdown table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dop_compile.evaluation.methods import ORIGINAL
from dop_compile.evaluation.result import Evaluation, Row
from dop_compile.reports.operation_picture import new_figure
from dop_compile.reports.table import EXECUTED_FLOPS, POLICY_FLOPS, show_bytes, show_flops, show_percent

__all__ = ["markdown", "tradeoff_figure"]


def markdown(result: Evaluation) -> str:
    """A line about what was measured, a table with a row per method, and what its columns are."""
    rows = result.rows()
    tasks = list(dict.fromkeys(result.tasks))
    heads = [
        "method",
        POLICY_FLOPS,
        EXECUTED_FLOPS,
        "KV cache",
        *(tasks if len(tasks) > 1 else []),
        "accuracy",
        "Rel. Avg.",
    ]
    heads += ["difference (95 %)", "changed", "vision ms", "selection ms", "prefill ms", "decode ms", "peak memory"]
    lines = [_about(result), "", _line(heads), _line(["---"] * len(heads))]
    lines += [_line(_cells(row, tasks if len(tasks) > 1 else [])) for row in rows]
    notes = [
        f"{POLICY_FLOPS} (eq. 11 at the samples' token counts), {EXECUTED_FLOPS} (of the tokens that entered, without",
        "work that reaches no output) and KV cache: of the decoder's prefill, as fractions of the original's.",
        "accuracy: mean over tasks; Rel. Avg.: mean over tasks of accuracy / original's. difference: of accuracy from",
        "the original's in points, with a paired bootstrap interval. changed: answers that are not the original's.",
        "Times are medians over samples; decode per token after the first. peak memory: "
        f"{result.environment['memory']}.",
    ]
    for session in range(1, 1 + max(method.session for method in result.methods)):
        later = ", ".join(method.label for method in result.methods if method.session == session)
        notes.append(f"Measured later than the rest, and their times at another moment: {later}.")
    if rows[0].relative_average is None:
        zero = [task for task, share in rows[0].accuracy.items() if not share]
        notes.append(f"Rel. Avg. is not defined: the original answers nothing right of {', '.join(zero)}.")
    return "\n".join([*lines, "", *notes])


def _about(result: Evaluation) -> str:
    header, where, runs = result.header, result.environment, result.method(ORIGINAL).runs
    flops, kv_bytes = (sum(values) / len(runs) for values in ((r.flops for r in runs), (r.kv_bytes for r in runs)))
    versions = ", ".join(f"{name} {where['packages'][name]}" for name in ("torch", "transformers"))
    groups = zip(zip(*result.counts, strict=True), ("system", "visual", "text"), strict=True)
    means = " + ".join(f"{sum(counts) / len(counts):.4g} {group}" for counts, group in groups)
    return (
        f"{header['model']} ({header['fingerprint'][:12]}), {header['dtype']}, {len(result.tasks)} samples; "
        f"{where['device']}, {where['threads']} threads, {versions}, backend {header['backend']}. A prompt takes the "
        f"original's decoder {show_flops(flops)} and {show_bytes(kv_bytes)} of KV cache; it has {means} tokens, in the "
        "mean."
    )


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(row: Row, tasks: Sequence[str]) -> list[str]:
    change = row.difference
    return [
        row.label,
        show_percent(row.flops),
        show_percent(row.executed_flops),
        show_percent(row.kv_bytes),
        *(show_percent(row.accuracy[task]) for task in tasks),
        show_percent(row.mean_accuracy),
        show_percent(row.relative_average),
        "" if row.label == ORIGINAL else f"{_points(change.value)} ({_points(change.low)} to {_points(change.high)})",
        str(row.changed),
        *(_milliseconds(value) for value in (row.vision_ms, row.selection_ms, row.prefill_ms, row.decode_ms)),
        show_bytes(row.memory_bytes),
    ]


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _milliseconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def tradeoff_figure(result: Evaluation) -> Any:
    """Rel. Avg. against FLOPs, a line per method; accuracy where Rel. Avg. is not defined.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    rows = result.rows()
    relative = rows[0].relative_average is not None
    figure = new_figure(7.5, 4.8)
    panel = figure.subplots()
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    for name, own in by_name.items():
        own.sort(key=lambda row: row.flops)
        shown = [row.relative_average if relative else row.mean_accuracy for row in own]
        style = {"marker": "*", "markersize": 12, "color": "black"} if name == ORIGINAL else {"marker": "o"}
        panel.plot([100 * row.flops for row in own], [100 * (value or 0.0) for value in shown], label=name, **style)
    panel.set_xlabel(f"{POLICY_FLOPS} (% of the original)")
    panel.set_ylabel("Rel. Avg. (% of the original)" if relative else "right answers (%)")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    return figure
