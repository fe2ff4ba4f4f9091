"""Tables and pictures of divergences and of the policies found in them.

Drawn on matplotlib's Agg canvas: no display is needed, and no global state of matplotlib is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dop_compile.policy.costs import kv_cache_bytes, policy_tokens, prefill_flops
from dop_compile.policy.policy import Policy
from dop_compile.reports.operation_map import OperationMap
from dop_compile.reports.operation_picture import TierPicture, new_figure, tiers_figure
from dop_compile.reports.table import MEASURED, POLICY_FLOPS, PREDICTED, columns, show_bytes, show_percent
from dop_compile.search.axes import VISUAL_TOKENS
from dop_compile.search.divergences import Divergences
from dop_compile.search.predict import predicted_divergence

__all__ = [
    "PolicyRow",
    "costs_note",
    "curves_figure",
    "describe",
    "pareto_figure",
    "policies_table",
    "policy_row",
    "tier_maps_figure",
]

RESAMPLES = 1000
CONFIDENCE = 0.95
LABELS = {
    "mha_depth": "MHA (queries, keys and values)",
    "mha_query_depth": "queries only",
    "mha_key_value_depth": "keys and values only",
    "mlp_depth": "MLP",
    "system_mha_depth": "MHA of system tokens",
    "system_mlp_depth": "MLP of system tokens",
}


@dataclass(frozen=True)
class PolicyRow:
    """What is known of one policy: costs as means over the samples, divergences of the measured metric.

    `flops` are policy FLOPs as a fraction of the original's. `predicted` is the sum of measured curves; `measured` that
    of the policy as a whole, and `accuracy` a fraction. None where not known.
    """

    name: str
    policy: Policy
    flops: float
    kv_bytes: float
    predicted: float | None
    measured: float | None = None
    accuracy: float | None = None


def policy_row(divergences: Divergences, name: str, policy: Policy, measured: float | None = None) -> PolicyRow:
    """The costs of a policy at the samples' own token counts, and its divergence as these curves predict it.

    `measured` is taken from the policy's provenance where it is None.
    """
    full = Policy.full(divergences.num_layers)
    spent = sum(prefill_flops(divergences.dims, policy, *counts) for counts in divergences.counts)
    whole = sum(prefill_flops(divergences.dims, full, *counts) for counts in divergences.counts)
    stored = [
        kv_cache_bytes(divergences.dims, policy_tokens(policy, *counts), divergences.dtype_bytes)
        for counts in divergences.counts
    ]
    if measured is None and policy.provenance is not None:
        measured = policy.provenance.measured_divergence
    predicted = predicted_divergence(divergences, policy)
    return PolicyRow(name, policy, spent / whole, float(np.mean(stored)), predicted, measured)


def costs_note(divergences: Divergences) -> str:
    """At which token counts costs are given."""
    means = " + ".join(
        f"{mean:.4g} {group}"
        for mean, group in zip(np.mean(divergences.counts, axis=0), ("system", "visual", "text"), strict=True)
    )
    prompts = "prompts" if divergences.transferred else "samples"
    return (
        f"{POLICY_FLOPS} (eq. 11) and KV cache: at the token counts of {len(divergences.counts)} {prompts}, {means} "
        "tokens in the mean"
    )


def _depths(policy: Policy) -> list[str]:
    """First layer in which each visual module is pruned, or "-"."""
    if policy.salient_fraction is not None:
        return ["split"] * 3
    found = [policy.pruned_layers("visual", module) for module in ("mha_query", "mha_key_value", "mlp")]
    return [str(layers[0]) if layers else "-" for layers in found]


def policies_table(rows: Sequence[PolicyRow]) -> str:
    """One line per policy: depths, tokens, costs and divergences."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    heads = ["policy", "queries", "keys", "MLP", "tokens", POLICY_FLOPS, "KV cache", PREDICTED, MEASURED, "accuracy"]
    lines = [heads] + [
        [
            row.name,
            *_depths(row.policy),
            "all" if row.policy.visual_tokens is None else str(row.policy.visual_tokens),
            show_percent(row.flops),
            show_bytes(row.kv_bytes),
            number(row.predicted),
            number(row.measured),
            "" if row.accuracy is None else show_percent(row.accuracy),
        ]
        for row in rows
    ]
    used = [column for column in range(len(heads)) if any(line[column] for line in lines[1:])]
    return "\n".join(columns([[line[column] for column in used] for line in lines]))


def describe(divergences: Divergences) -> str:
    """Mean divergence per axis and point."""
    visual = sorted({counts[1] for counts in divergences.counts})
    span = str(visual[0]) if len(visual) == 1 else f"{visual[0]} to {visual[-1]}"
    lines = [
        f"{len(divergences.digests)} samples of {span} visual tokens, {divergences.num_layers} layers, metric "
        f"{divergences.metric}, reducer {divergences.base.reducer!r}; measured for the cost of "
        f"{divergences.prefills:.1f} original prefills a sample",
        "",
    ]
    table = []
    for axis in divergences.points:
        known, means = divergences.coordinates(axis), divergences.means(axis)
        table.append([axis, *(f"{x:.0f}: {y:.4f}" for x, y in zip(known, means, strict=True))])
    width = max(map(len, table))
    table = [row + [""] * (width - len(row)) for row in table]
    return "\n".join(lines + columns(table))


def bootstrap_band(values: np.ndarray[Any, Any], seed: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """95 % confidence band of the mean over samples, of (points, samples); by the percentile bootstrap."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, values.shape[1], size=(RESAMPLES, values.shape[1]))
    means = values[:, drawn].mean(axis=2)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=1)
    return low, high


def curves_figure(divergences: Divergences) -> Any:
    """Mean divergence along every axis with its confidence band (DOP figure 4).

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = new_figure(11, 4.2)
    left, right = figure.subplots(1, 2)
    for axis in divergences.points:
        panel = right if axis == VISUAL_TOKENS else left
        known, means = divergences.coordinates(axis), divergences.means(axis)
        low, high = bootstrap_band(divergences.array(axis)[::-1])
        (line,) = panel.plot(known, means, marker="o", label=LABELS.get(axis, axis))
        panel.fill_between(known, [*low, 0.0], [*high, 0.0], alpha=0.2, color=line.get_color())
    left.set_xlabel("layers in which visual tokens take part")
    right.set_xlabel("visual tokens that enter")
    if left.lines:
        left.legend(fontsize=8, loc="lower left")
    for panel in (left, right):
        panel.set_ylabel(f"divergence ({divergences.metric})")
        panel.set_yscale("symlog", linthresh=1e-3)
        panel.grid(alpha=0.3)
    return figure


def pareto_figure(rows: Sequence[PolicyRow], metric: str) -> Any:
    """Divergence against FLOPs of policies, predicted and measured, and accuracy where it is known."""
    known = any(row.accuracy is not None for row in rows)
    figure = new_figure(11 if known else 6, 4.2)
    panels = figure.subplots(1, 2 if known else 1, squeeze=False)[0]
    for field, label, marker in (("predicted", PREDICTED, "x"), ("measured", MEASURED, "o")):
        found = [(100 * row.flops, value) for row in rows if (value := getattr(row, field)) is not None]
        if found:
            panels[0].plot(*zip(*sorted(found), strict=True), marker=marker, label=label)
    panels[0].set_ylabel(f"divergence ({metric})")
    if panels[0].lines:
        panels[0].legend(fontsize=8)
    if known:
        found = sorted((100 * row.flops, 100 * row.accuracy) for row in rows if row.accuracy is not None)
        panels[1].plot(*zip(*found, strict=True), marker="o")
        panels[1].set_ylabel("right answers (%)")
    for panel in panels:
        panel.set_xlabel(f"{POLICY_FLOPS} (% of the original)")
        panel.grid(alpha=0.3)
    return figure


def tier_maps_figure(rows: Sequence[PolicyRow], visual_tokens: int) -> Any:
    """Which operations each policy keeps for the visual tokens: layers by modules."""
    return tiers_figure(
        [
            TierPicture(
                f"{row.name}\n{POLICY_FLOPS} {show_percent(row.flops)}",
                OperationMap.of_policy(row.policy, visual=visual_tokens),
            )
            for row in rows
        ]
    )
