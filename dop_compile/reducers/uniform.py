"""Evenly spaced tokens: the control without any knowledge of the image.

Of N tokens, T are kept: floor((i + 0.5) * N / T) for i = 0 .. T - 1, the middles of T equal stretches.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from dop_compile.reducers.base import Selection, VisualContext

__all__ = ["UniformReducer"]


@dataclass(frozen=True)
class UniformReducer:
    """Keeps every (N / T)-th token, ranked so that each prefix of the ranking is spread evenly too."""

    name = "uniform"
    requires = frozenset[str]()
    reads_values = False

    def __call__(self, context: VisualContext, count: int) -> Selection:
        kept = _ranked_stride(context.tokens, count)
        return Selection(torch.tensor(kept, dtype=torch.long, device=context.projected.device))


@lru_cache(maxsize=256)
def _ranked_stride(tokens: int, count: int) -> tuple[int, ...]:
    """The kept indices in bit-reversal (van der Corput) order of their number."""
    bits = max(count - 1, 0).bit_length()
    reversals = (int(format(i, f"0{bits}b")[::-1], 2) for i in range(1 << bits))
    return tuple((2 * i + 1) * tokens // (2 * count) for i in reversals if i < count)
