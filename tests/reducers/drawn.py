"""Drawn visual contexts, with many equal numbers and equal rows, so that ties are common.

Integers are not negative: products of several signs that cancel out are zero or not by the order in which they are
added, and the sign of what is left would decide among orthogonal rows. Without, each product is zero itself. Any other
cosines that are equal round to the same float32, since they are no number between two of these.
"""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from dop_compile.reducers import VisualContext

VISION, HIDDEN, KEY = 7, 5, 4


@st.composite
def contexts(draw: st.DrawFn, tokens: int | None = None, max_tokens: int = 40) -> VisualContext:
    """A context with every field; numbers of few different values, and rows that repeat."""
    count = draw(st.integers(1, max_tokens)) if tokens is None else tokens
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    smooth = draw(st.booleans())
    different = draw(st.integers(1, count))
    again = rng.integers(0, different, count) if draw(st.booleans()) else np.arange(count)

    def rows(width: int) -> torch.Tensor:
        values = rng.normal(size=(count, width)) if smooth else rng.integers(0, 4, (count, width))
        return torch.tensor(values[again], dtype=torch.float32)

    attention = rng.random(count) if smooth else rng.integers(0, 5, count)
    weight = torch.tensor(rng.normal(size=(VISION, HIDDEN)), dtype=torch.float32)
    features = rows(VISION)
    text = torch.tensor(rng.normal(size=(draw(st.integers(1, 4)), HIDDEN)), dtype=torch.float32)
    return VisualContext(
        projected=features @ weight,
        text=text,
        segments=torch.zeros(count, dtype=torch.long),
        sample_index=0,
        features=features,
        cls_attention=torch.tensor(attention[again] / max(attention.sum(), 1), dtype=torch.float32),
        keys=rows(KEY),
        project=lambda merged: merged @ weight,
        tiles=torch.zeros(count, dtype=torch.long),
        instruction_start=draw(st.integers(0, len(text))),
    )


@st.composite
def contexts_and_counts(draw: st.DrawFn) -> tuple[VisualContext, int]:
    context = draw(contexts())
    return context, draw(st.integers(0, context.tokens))
