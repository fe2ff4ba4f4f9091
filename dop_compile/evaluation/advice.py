"""Which tier to take, by what questions that were not searched on show; as a sentence, a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dop_compile.evaluation.methods import ORIGINAL
from dop_compile.evaluation.result import Evaluation, Row
from dop_compile.reports.operation_picture import new_figure
from dop_compile.reports.table import POLICY_FLOPS, columns, show_bytes, show_percent
from dop_compile.search.optimize import Choice

__all__ = ["TOKENS_ONLY", "Advice", "advice_figure", "advise", "first_token_ms"]

TOKENS_ONLY = "tokens only"
"""What a tier of the reducer alone is called, behind its budget."""
AS_FAST = 1.05
"""Times that differ by less are taken as equal: so much differs from run to run."""


@dataclass(frozen=True)
class Advice:
    """What is advised, and from what.

    Args:
        label: of the tier; None where the original is advised.
        sentence: the advice in words.
        text: the table, what its columns are, and the sentence.
        result: every answer and time.
    """

    label: str | None
    sentence: str
    text: str
    result: Evaluation


def first_token_ms(row: Row) -> float:
    """Median milliseconds of vision, selection and prefill together."""
    return row.vision_ms + row.selection_ms + row.prefill_ms


def advise(
    result: Evaluation, choices: Mapping[str, Choice], *, max_loss: float, max_ms: float | None = None
) -> Advice:
    """The tier to take of what was asked.

    1. with `max_ms`: of those that answer in time, the one that loses least, and of equals the cheapest;
    2. without: of those that lose at most `max_loss` of all answers and are not slower than the original, the fastest;
       of those that are as fast, the one that loses least, and of equals the cheapest.

    What qualifies nowhere is said, with what comes nearest; then the original is advised.
    """
    rows = result.rows()
    original, tiers = rows[0], rows[1:]
    if max_ms is not None:
        chosen = [row for row in tiers if first_token_ms(row) <= max_ms]
        best = min(chosen, key=lambda row: (_loss(row), row.flops), default=None)
    else:
        chosen = [row for row in tiers if _loss(row) <= max_loss and first_token_ms(row) <= first_token_ms(original)]
        limit = AS_FAST * min(map(first_token_ms, chosen), default=0.0)
        fastest = [row for row in chosen if first_token_ms(row) <= limit]
        best = min(fastest, key=lambda row: (_loss(row), row.flops), default=None)
    if best is not None:
        sentence = f"Take {best.label!r}: {_words(best, original)}."
    elif max_ms is not None:
        nearest = min(tiers, key=first_token_ms)
        sentence = (
            f"No tier gives its first token within {max_ms:g} ms; the fastest, {nearest.label!r}, takes "
            f"{first_token_ms(nearest):.3g} ms. Stay with the original, or allow more."
        )
    else:
        nearest = min(tiers, key=_loss)
        slower = _loss(nearest) <= max_loss
        why = "is slower than the original here" if slower else f"loses {_points(_loss(nearest))} points"
        sentence = (
            f"Stay with the original: no tier that is at least as fast loses at most {_points(max_loss)} points of all "
            f"answers; the nearest, {nearest.label!r}, {why}. A larger --budget, --max-loss or more samples may help."
        )
    text = "\n".join([_table(result, rows, choices), "", *_notes(result, choices), "", sentence])
    return Advice(None if best is None else best.label, sentence, text, result)


def _loss(row: Row) -> float:
    return max(0.0, -row.difference.value)


def _points(share: float) -> str:
    return f"{100 * share:.3g}"


def _words(row: Row, original: Row) -> str:
    change, ratio = row.difference, first_token_ms(row) / first_token_ms(original)
    return (
        f"{show_percent(row.flops)} of the {POLICY_FLOPS}, {ratio:.2f} of the original's time to the first token, "
        f"{show_percent(row.kv_bytes)} of its KV cache, and {100 * change.value:+.1f} points of right answers (95 %: "
        f"{100 * change.low:+.1f} to {100 * change.high:+.1f})"
    )


def _table(result: Evaluation, rows: Sequence[Row], choices: Mapping[str, Choice]) -> str:
    whole, kv_bytes = first_token_ms(rows[0]), _mean_kv(result)
    heads = [
        "tier",
        POLICY_FLOPS,
        "first token",
        "ratio",
        "KV cache",
        "divergence",
        "right",
        "difference (95 %)",
        "changed",
    ]
    lines = [heads]
    for row in rows:
        ms, change = first_token_ms(row), row.difference
        lines.append(
            [
                row.label,
                show_percent(row.flops),
                f"{ms:.3g} ms",
                f"{ms / whole:.2f}",
                show_bytes(kv_bytes * row.kv_bytes),
                _divergence(row.label, choices),
                show_percent(row.mean_accuracy),
                ""
                if row.label == ORIGINAL
                else f"{100 * change.value:+.1f} ({100 * change.low:+.1f} to {100 * change.high:+.1f})",
                str(row.changed),
            ]
        )
    return "\n".join(columns(lines))


def _mean_kv(result: Evaluation) -> float:
    runs = result.method(ORIGINAL).runs
    return sum(run.kv_bytes for run in runs) / len(runs)


def _divergence(label: str, choices: Mapping[str, Choice]) -> str:
    """The joint divergence that the search reported; that of the original is none."""
    rated = {name: choice.taken for name, choice in choices.items()}
    rated |= {
        f"{name} {TOKENS_ONLY}": one for name, choice in choices.items() if (one := choice.tokens_only) is not None
    }
    if label == ORIGINAL:
        return "0"
    known = rated[label]
    return f"{known.candidate.divergence if known.reported is None else known.reported:.4f}"


def _notes(result: Evaluation, choices: Mapping[str, Choice]) -> list[str]:
    asked, where = len(result.tasks), result.environment
    samples = next((choice.samples for choice in choices.values() if choice.samples is not None), None)
    notes = [
        f"right: of {asked} questions that were not searched on, mean over tasks; difference from the original in",
        "points, with a paired bootstrap interval; changed: answers that are not the original's. first token: vision,",
        f"selection and prefill, medians on {where['device']}, {where['threads']} threads; KV cache: of a prompt.",
    ]
    if samples is not None:
        notes.append(
            f"divergence: of the first token from the original's (KL), on {samples[1]} samples that did not select."
        )
    return notes


def advice_figure(advice: Advice) -> Any:
    """Right answers with their intervals against policy FLOPs: a point per tier, the original as a line.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    rows = advice.result.rows()
    original = rows[0]
    figure = new_figure(7.5, 4.8)
    panel = figure.subplots()
    panel.axhline(100 * original.mean_accuracy, color="black", linewidth=1, linestyle="--", label="original")
    for alone, color, shape, label in ((False, "tab:blue", "o", "taken"), (True, "tab:orange", "s", TOKENS_ONLY)):
        for row in (row for row in rows[1:] if row.label.endswith(TOKENS_ONLY) == alone):
            place, change = (100 * row.flops, 100 * row.mean_accuracy), row.difference
            spread = [[100 * (change.value - change.low)], [100 * (change.high - change.value)]]
            size = 9 if row.label == advice.label else 5
            panel.errorbar(*place, yerr=spread, fmt=shape, color=color, markersize=size, capsize=3, label=label)
            label = "_"  # one entry in the legend for all of a kind
            panel.annotate(
                row.label.removesuffix(f" {TOKENS_ONLY}"),
                place,
                xytext=(5, -13 if alone else 6),
                textcoords="offset points",
                fontsize=8,
                color=color,
            )
    panel.set_ylim(0, 105)
    panel.set_xlim(0, 105)
    panel.set_xlabel(f"{POLICY_FLOPS} (% of the original)")
    panel.set_ylabel("right answers (%)")
    panel.set_title("95 % intervals are those of the difference from the original", fontsize=9)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, loc="lower right")
    return figure
