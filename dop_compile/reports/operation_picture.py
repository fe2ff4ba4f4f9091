"""Pictures of which operations are kept: layers down, modules and token groups across.

    queries        keys/values      MLP            FLOPs per layer
    sys vis txt    sys vis txt      sys vis txt
    ## #### ##     ## #### ##       ## #### ##     ==========|   layer 0
    ##      ##     ## #### ##       ##      ##     =====     |   layer 1, visual frozen

Every cell is filled by the share of the group's tokens that it processes. Of equal neighbouring layers the first has
the numbers.
Drawn on matplotlib's Agg canvas: no display is needed, and no global state of matplotlib is changed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dop_compile.reports.operation_map import ABSENT, FROZEN, OperationMap
from dop_compile.reports.table import show_flops

__all__ = ["TierPicture", "draw_map", "new_figure", "tiers_figure"]

COLOURS = {
    "system": "#E69F00",
    "visual": "#0072B2",
    "visual_salient": "#0072B2",
    "visual_rest": "#56B4E9",
    "text": "#009E73",
}
"""Okabe and Ito's, told apart by most colour-blind readers; the place of a cell says the same."""

HEADS = ("queries", "keys/values", "MLP")
SHORT = {"visual_salient": "salient", "visual_rest": "rest"}
FLOPS, TRACK, INK = "#5A5A5A", "#EDEDED", "#222222"
WIDE, NARROW, GAP, MARKS, LANE = 0.78, 0.48, 0.2, 0.72, 0.1
"""Inches: columns of visual tokens and of others, between modules, for the names of states and for their lines."""
BARS, ROW, CELL, SPACE = 1.5, 0.2, 0.86, 0.04
"""Inches: FLOPs bars, a layer; the part of a layer's height that is filled, and inches between columns."""
ABREAST = 3
HATCH = "///////"
STYLES: dict[str, Any] = {FROZEN: ":", ABSENT: "-"}


@dataclass(frozen=True)
class TierPicture:
    """What is drawn of one tier: its title, its operations, and (layers,) FLOPs where they are known."""

    title: str
    operations: OperationMap
    flops: tuple[int, ...] = ()
    original_flops: tuple[int, ...] = ()


def new_figure(width: float, height: float) -> Any:
    """An empty picture of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _columns(operations: OperationMap) -> list[list[tuple[float, float]]]:
    """Left edge and width of every module's groups, in inches."""
    widths = [WIDE if group.startswith("visual") else NARROW for group in operations.groups]
    own = sum(widths) + GAP
    edges = list(itertools.accumulate(widths, initial=0.0))
    return [[(module * own + left, width) for left, width in zip(edges, widths, strict=False)] for module in range(3)]


def _map_width(operations: OperationMap) -> float:
    left, width = _columns(operations)[-1][-1]
    return left + width + (MARKS + LANE * len(_marked(operations)) if _marked(operations) else 0.0)


def _marked(operations: OperationMap) -> list[str]:
    """Groups that are frozen or absent in some layer."""
    layers = range(len(operations))
    return [group for group in operations.groups if any(operations.state(layer, group) for layer in layers)]


def draw_map(axes: Any, operations: OperationMap, *, labelled: bool = True) -> None:
    """Draw the cells into matplotlib axes, layer 0 at the top; layers are labelled if `labelled`."""
    layers, columns = range(len(operations)), _columns(operations)
    for module, places in enumerate(columns):
        for number, (group, (left, width)) in enumerate(zip(operations.groups, places, strict=True)):
            full, colour = operations.before[number], COLOURS[group]
            kept, ran = (part[:, module, number] / full for part in (operations.kept, operations.processed))
            drawn = width - SPACE
            axes.barh(layers, drawn, CELL, left, color=TRACK)
            unread = (kept - ran).clip(min=0) * drawn
            axes.barh(
                layers, unread, CELL, left + ran * drawn, color="none", edgecolor=colour, hatch=HATCH, linewidth=0
            )
            axes.barh(layers, ran * drawn, CELL, left, color=colour)
            counts = operations.processed[:, module, number]
            for run in operations.runs():
                if counts[run[0]]:
                    _number(axes, run, int(counts[run[0]]), left, drawn * counts[run[0]] / full, colour)
            _head(axes, left + drawn / 2, f"{SHORT.get(group, group)}\n{full}", 3, 7)
        _head(axes, (places[0][0] + sum(places[-1])) / 2, HEADS[module], 26, 9, "bold")
    _mark_states(axes, operations, sum(columns[-1][-1]))
    axes.set_xlim(0, _map_width(operations))
    _layer_axis(axes, operations, labelled)


def _head(axes: Any, x: float, text: str, points: float, size: float, weight: str = "normal") -> None:
    axes.annotate(
        text, (x, 1), (0, points), xycoords=("data", "axes fraction"), textcoords="offset points",
        fontsize=size, fontweight=weight, color=INK, ha="center", va="bottom", linespacing=1.1, annotation_clip=False,
    )  # fmt: skip


def _number(axes: Any, run: range, count: int, left: float, filled: float, colour: str) -> None:
    """The count of a run of layers, inside its first bar or, where that is too short, after it."""
    text = str(count)
    inside = filled > 0.075 * len(text) + 0.05
    x = left + (filled / 2 if inside else filled + 0.03)
    ink = ("white" if colour == COLOURS["visual"] else "black") if inside else INK
    box = None if inside else {"facecolor": TRACK, "edgecolor": "none", "pad": 0.6}
    axes.text(x, run[0], text, fontsize=7.5, color=ink, ha="center" if inside else "left", va="center", bbox=box)


def _mark_states(axes: Any, operations: OperationMap, left: float) -> None:
    """A line beside the layers in which a group is frozen or absent, a lane per group."""
    lanes = _marked(operations)
    for lane, group in enumerate(lanes):
        x = left + 0.04 + LANE * lane
        states = [operations.state(layer, group) for layer in range(len(operations))]
        for state, run in itertools.groupby(range(len(states)), states.__getitem__):
            if not state:
                continue
            first, *others = run
            last = others[-1] if others else first
            ends = [first - CELL / 2, last + CELL / 2]
            axes.plot([x, x], ends, STYLES[state], color=COLOURS[group], linewidth=1.8)
            words = f"{SHORT.get(group, group)} {state}"
            axes.text(left + 0.04 + LANE * len(lanes), first, words, fontsize=7, color=INK, va="center")


def _layer_axis(axes: Any, operations: OperationMap, labelled: bool) -> None:
    count = len(operations)
    starts = sorted({run[0] for run in operations.runs()} | {count - 1})
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_yticks(starts if labelled else [], starts if labelled else [], fontsize=7)
    axes.tick_params(length=0, pad=2)
    axes.set_xticks([])
    if labelled:
        axes.set_ylabel("layer", fontsize=8)
    axes.spines[:].set_visible(False)


def _draw_flops(axes: Any, tier: TierPicture) -> None:
    """A bar per layer against the original's."""
    layers, whole = range(len(tier.flops)), max(tier.original_flops)
    axes.barh(layers, tier.original_flops, CELL, color=TRACK)
    axes.barh(layers, tier.flops, CELL, color=FLOPS)
    for run in tier.operations.runs(tier.flops):
        flops = tier.flops[run[0]]
        inside = flops > 0.6 * whole
        axes.text(
            flops + (-0.03 if inside else 0.03) * whole, run[0], show_flops(flops),
            fontsize=7.5, color="white" if inside else INK, ha="right" if inside else "left", va="center",
        )  # fmt: skip
    axes.set_xlim(0, whole)
    _head(axes, whole / 2, f"original\n{show_flops(whole)}", 3, 7)
    _head(axes, whole / 2, "FLOPs per layer", 26, 9, "bold")
    _layer_axis(axes, tier.operations, labelled=False)


def tiers_figure(tiers: Sequence[TierPicture], title: str = "") -> Any:
    """A panel per tier, up to three abreast, with a legend of what cells mean.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    abreast = min(ABREAST, len(tiers))
    rows = -(-len(tiers) // abreast)
    widths = [_map_width(tier.operations) for tier in tiers]
    bars = BARS * bool(tiers[0].flops)
    height = max(ROW * len(tiers[0].operations), 1.0)
    # Tiers below one another share a column, which is as wide as the widest of them
    across = [max(widths[column::abreast]) + bars + 0.5 for column in range(abreast)]
    figure = new_figure(sum(across), rows * (height + 1.1) + (0.75 if title else 0.45))
    grid = figure.subfigures(rows, abreast, squeeze=False, width_ratios=across)
    for panel, tier, width in zip(grid.flat, tiers, widths, strict=False):
        panel.suptitle(tier.title, fontsize=9.5)
        ratios = [width, bars] if bars else [width]
        axes = panel.subplots(1, len(ratios), squeeze=False, width_ratios=ratios)[0]
        draw_map(axes[0], tier.operations)
        if bars:
            _draw_flops(axes[1], tier)
    if title:
        figure.suptitle(title, fontsize=10)
    _legend(figure, tiers)
    return figure


def _legend(figure: Any, tiers: Sequence[TierPicture]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    visual = next((COLOURS[g] for g in tiers[0].operations.groups if g.startswith("visual")), COLOURS["text"])
    entries: list[Any] = [
        Patch(color=visual, label="processed"),
        Patch(
            facecolor="none", edgecolor=visual, hatch=HATCH, linewidth=0, label="kept, but no output needs it: not run"
        ),
        Patch(color=TRACK, label="not processed"),
    ]
    if all(tier.operations.computed is None for tier in tiers):
        del entries[1]
    if any(_marked(tier.operations) for tier in tiers):
        entries.append(
            Line2D([], [], color=INK, linestyle=STYLES[FROZEN], label="frozen: only keys and values are left")
        )
        entries.append(Line2D([], [], color=INK, linestyle=STYLES[ABSENT], label="absent: nothing is left"))
    figure.legend(handles=entries, loc="outside lower center", ncols=len(entries), fontsize=7.5, frameon=False)
