"""What a study gives back: a table and a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dop_compile.policy.policy import Policy
from dop_compile.reports.operation_picture import new_figure
from dop_compile.reports.table import columns

__all__ = ["Cell", "Measure", "Study", "losses_of"]

Cell = str | int | float | None
Measure = Callable[[Sequence[Policy]], ArrayLike]
"""The loss of each policy, smaller is better: (policies,), or (policies, samples), of which the mean is taken."""

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Study:
    """The result of one study.

    Args:
        title: what was studied, and what came out, in a line.
        heads: of the table's columns.
        rows: numbers and texts, None where there is nothing to say.
        draw: draws the picture into a matplotlib figure.
        size: of that figure, in inches.
    """

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    draw: Callable[[Any], None]
    size: tuple[float, float] = (6, 4.2)

    def column(self, head: str) -> list[Cell]:
        """The values of a column.

        Raises:
            ValueError: there is no such column.
        """
        if head not in self.heads:
            raise ValueError(f"column {head!r}: expected one of {', '.join(self.heads)}")
        return [row[self.heads.index(head)] for row in self.rows]

    def table(self) -> str:
        """The title and the table, in aligned columns."""
        return "\n".join([self.title, "", *columns([self.heads, *self._cells()])])

    def markdown(self) -> str:
        """The title and the table, in Markdown."""
        lines = [self.heads, ("---",) * len(self.heads), *self._cells()]
        return "\n".join([self.title, "", *(f"| {' | '.join(line)} |" for line in lines)])

    def _cells(self) -> list[tuple[str, ...]]:
        return [tuple(_show(cell) for cell in row) for row in self.rows]

    def figure(self) -> Any:
        """A matplotlib figure.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        figure = new_figure(*self.size)
        self.draw(figure)
        return figure


def _show(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def losses_of(measure: Measure, policies: Sequence[Policy]) -> Array:
    """(policies,) mean losses.

    Raises:
        ValueError: the measure gave something else than a finite number for each policy (and sample).
    """
    found = np.asarray(measure(policies), dtype=np.float64)
    if found.ndim not in (1, 2) or len(found) != len(policies) or not found.size:
        raise ValueError(
            f"measure: expected losses of {len(policies)} policies, (policies,) or (policies, samples), got an array "
            f"of the shape {found.shape}"
        )
    if not np.isfinite(found).all():
        raise ValueError("measure: expected finite losses")
    means: Array = found.mean(axis=1) if found.ndim == 2 else found
    return means
