"""The residual stream of a step: all rows together, or visual and other rows apart.

Together it is vLLM's pair (hidden, residual), whose sum is the stream; layers add the two where they normalise. Apart,
other rows are such a pair, and visual rows one tensor, which most layers leave alone or do not have any more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["Streams"]


class Streams:
    """Begins with all rows together.

    Args:
        hidden: (rows, hidden).
        positions: (rows,) or (3, rows).
        visual, others: rows of each kind, which together are all.
    """

    def __init__(self, hidden: Tensor, positions: Tensor, visual: Tensor, others: Tensor) -> None:
        self.positions = positions
        self.positions_of_visual = positions[..., visual]
        self._positions_of_others = positions[..., others]
        self._rows = (visual, others)
        self._shape = hidden.shape
        self._hidden: Tensor = hidden  # of all rows, or of the others
        self._residual: Tensor | None = None
        self._visual: Tensor | None = None  # None while together, and once dropped
        self._apart = False

    @property
    def all(self) -> Tensor:
        """(rows, hidden), together."""
        self._join()
        self._hidden, self._residual = self._sum(), None
        return self._hidden

    @property
    def visual(self) -> Tensor:
        """(visual, hidden), apart."""
        self._split()
        assert self._visual is not None, "dropped"
        return self._visual

    def update_all(self, layer: Any) -> None:
        self._join()
        self._hidden, self._residual = layer(self.positions, self._hidden, self._residual)

    def update_others(self, layer: Any) -> None:
        self._split()
        if len(self._hidden):
            self._hidden, self._residual = layer(self._positions_of_others, self._hidden, self._residual)

    def add_to_all(self, update: Tensor, rows: Tensor | None = None) -> None:
        stream = self.all
        self._hidden = stream + update if rows is None else stream.index_add(0, rows, update)

    def add_to_others(self, update: Callable[[Tensor], Tensor]) -> None:
        self._split()
        if len(self._hidden):
            self._hidden = self._sum()
            self._hidden, self._residual = self._hidden + update(self._hidden), None

    def add_to_visual(self, update: Tensor) -> None:
        self._visual = self.visual + update

    def add_deepstack(self, features: Tensor) -> None:
        """(rows, hidden) features that a vision tower adds behind a layer, zero for other rows."""
        if not self._apart:
            self._hidden = self._hidden + features
        elif self._visual is not None:
            self._visual = self._visual + features[self._rows[0]]

    def drop_visual(self) -> None:
        """From here on nobody reads visual rows."""
        self._split()
        self._visual = None

    def finish(self, norm: Any) -> Tensor:
        """(rows, hidden) normalised; zero where rows were dropped."""
        if self._residual is None:
            normed = norm(self._hidden) if len(self._hidden) else self._hidden
        else:
            normed, _ = norm(self._hidden, self._residual)
        if not self._apart:
            return normed
        whole = normed.new_zeros(self._shape)
        whole[self._rows[1]] = normed
        return whole

    def _sum(self) -> Tensor:
        return self._hidden if self._residual is None else self._hidden + self._residual

    def _split(self) -> None:
        if self._apart:
            return
        stream, (visual, others) = self._sum(), self._rows
        self._visual, self._hidden, self._residual = stream[visual], stream[others], None
        self._apart = True

    def _join(self) -> None:
        if not self._apart:
            return
        assert self._visual is not None, "dropped rows do not come back"
        visual, others = self._rows
        stream = self._hidden.new_zeros(self._shape)  # vLLM may have padded the step with rows of neither kind
        stream[visual], stream[others] = self._visual, self._sum()
        self._hidden, self._residual, self._visual, self._apart = stream, None, None, False
