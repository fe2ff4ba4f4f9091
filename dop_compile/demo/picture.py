"""The demo's picture: image, answers, and which operations each tier keeps.

Drawn from a `DemoResult` alone, on matplotlib's Agg canvas: no display is needed, and no global state of matplotlib is
changed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dop_compile.demo.result import DemoResult, TierResult, shorten
from dop_compile.reports.operation_map import OperationMap
from dop_compile.reports.operation_picture import draw_map, new_figure
from dop_compile.reports.table import POLICY_FLOPS, show_percent

__all__ = ["draw"]

RIGHT, WRONG, UNKNOWN = "#1b7837", "#b2182b", "#222222"


def draw(result: DemoResult) -> Any:
    """A matplotlib figure: the image and the answers above, one operation map per tier below.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = new_figure(12, 8)
    upper, lower = figure.subfigures(2, 1, height_ratios=(5, 6))
    left, right = upper.subplots(1, 2, width_ratios=(1, 3))
    left.imshow(np.asarray(result.image))
    left.set_title("input", fontsize=10)
    left.set_axis_off()
    _draw_answers(right, result)
    maps = lower.subplots(1, len(result.tiers), squeeze=False)[0]
    for axes, tier in zip(maps, result.tiers, strict=True):
        draw_map(axes, OperationMap.of_policy(tier.policy, visual=result.visual))
        axes.set_title(_caption(tier, result), fontsize=9, pad=46)
    return figure


def _caption(tier: TierResult, result: DemoResult) -> str:
    cost = tier.cost
    prefill = tier.answered.milliseconds[-1] / result.original.milliseconds[-1]
    return (
        f"{cost.tier}\n{POLICY_FLOPS} {show_percent(cost.eq11_ratio)}, executed {show_percent(cost.executed_ratio)}\n"
        f"KV cache {show_percent(cost.kv_ratio)}, prefill time {show_percent(prefill)} (batch {result.batches[-1]})"
    )


def _draw_answers(axes: Any, result: DemoResult) -> None:
    """A table of questions by models; right and wrong are told by a mark and by colour."""
    axes.set_axis_off()
    looks = {True: (" \N{CHECK MARK}", RIGHT), False: (" \N{BALLOT X}", WRONG), None: ("", UNKNOWN)}
    judged = [result.right(model.answers) for model in result.models]
    cells = [[question.text, question.answer or "?"] for question in result.questions]
    for model, right in zip(result.models, judged, strict=True):
        for row, answer, mark in zip(cells, model.answers, right, strict=True):
            row.append(shorten(answer) + looks[mark][0])
    heads = ["question", "expected", *(model.name for model in result.models)]
    widths = [0.46, 0.09] + [0.45 / len(result.models)] * len(result.models)
    table = axes.table(cells, colLabels=heads, colWidths=widths, loc="center", cellLoc="left", colLoc="left")
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.scale(1, 1.7)
    for (row, column), cell in table.get_celld().items():
        cell.set_edgecolor("#cccccc")
        cell.PAD = 0.04
        if row and column >= 2:
            cell.get_text().set_color(looks[judged[column - 2][row - 1]][1])
