"""The policies that are searched, all at once, and what each is predicted to lose.

Spaces:
- "dop": (d_A, d_P, n_v), the paper's; proxy D_A(d_A) + D_P(d_P) + D_v(n_v).
- "split": queries and key-values apart, (d_Q, d_K, d_P, n_v) with d_Q, d_P <= d_K; proxy
  D_A(d_K) + [D_Q(d_Q) - D_Q(d_K)] + [D_P(d_P) - D_P(d_K)] + D_v(n_v).
  Without keys nobody reads a visual token, so that D_A is the curve of the keys, and what is updated at d_K or later is
  dead: it costs FLOPs and changes nothing. Every policy of "dop" is therefore matched by one of "split" that is no
  dearer and whose proxy is no larger.
"""

from __future__ import annotations

import numpy as np

from dop_compile.search.axes import DOP_AXES, SPLIT_AXES, VISUAL_TOKENS
from dop_compile.search.curves import curve
from dop_compile.search.divergences import Divergences

__all__ = ["SPACES", "Space"]

SPACES = {"dop": DOP_AXES, "split": SPLIT_AXES}
"""The axes that each space needs."""


class Space:
    """Every combination of depths, as flat arrays, and the divergence of each but for the visual tokens."""

    @classmethod
    def of_tokens_alone(cls, divergences: Divergences, monotone: bool) -> Space:
        """The one combination in which no operation is pruned."""
        space = object.__new__(cls)
        space.tokens = curve(divergences, VISUAL_TOKENS, monotone=monotone)
        space.query = space.keys = space.mlp = np.array([divergences.num_layers])
        space.divergence = np.zeros(1)
        return space

    def __init__(self, divergences: Divergences, space: str, monotone: bool):
        layers = divergences.num_layers
        both, mlp = (curve(divergences, axis, monotone=monotone) for axis in ("mha_depth", "mlp_depth"))
        self.tokens = curve(divergences, VISUAL_TOKENS, monotone=monotone)
        depths = np.arange(layers + 1)
        if space == "dop":
            self.keys, self.mlp = (grid.ravel() for grid in np.meshgrid(depths, depths, indexing="ij"))
            self.query = self.keys
            self.divergence = both[self.keys] + mlp[self.mlp]
        else:
            query = curve(divergences, "mha_query_depth", monotone=monotone)
            grids = np.meshgrid(depths, depths, depths, indexing="ij")
            inside = (grids[0] <= grids[1]) & (grids[2] <= grids[1])
            self.query, self.keys, self.mlp = (grid[inside] for grid in grids)
            with np.errstate(invalid="ignore"):  # inf - inf, below the lowest measured depths
                updates = np.where(self.query == self.keys, 0.0, query[self.query] - query[self.keys])
                changes = np.where(self.mlp == self.keys, 0.0, mlp[self.mlp] - mlp[self.keys])
            self.divergence = both[self.keys] + updates + changes
        self.divergence = np.where(np.isnan(self.divergence), np.inf, self.divergence)
