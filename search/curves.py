"""From measured points to a divergence at every value of an axis (DOP C.1)."""

from __future__ import annotations

from typing import Any

import numpy as np

from dop_compile.search.axes import VISUAL_TOKENS
from dop_compile.search.divergences import Divergences

__all__ = ["curve"]

Array = np.ndarray[Any, np.dtype[np.float64]]


def curve(divergences: Divergences, axis: str, *, monotone: bool = True) -> Array:
    """(full + 1,) mean divergence at 0, 1, ..., full kept layers, or visual tokens of each sample.

    Linear between the measured points (eq. 8) and the full value, whose divergence is zero; infinite below the lowest
    measured point, where nothing is known. A sample that has fewer visual tokens than are kept loses nothing.

    Args:
        monotone: keeping more never costs: each value is the least of those measured at it or below. Noise of few
            samples can make the measured points rise.
    """
    values = divergences.array(axis)[::-1]
    if axis == VISUAL_TOKENS:
        wanted = np.arange(divergences.visual_tokens + 1, dtype=np.float64)
        found = np.zeros(len(wanted))
        for sample, visual in enumerate(divergences.sample_tokens):
            found += _interpolate(wanted, divergences.coordinates(axis, visual), values[:, sample])
        found /= values.shape[1]
    else:
        wanted = np.arange(divergences.num_layers + 1, dtype=np.float64)
        found = _interpolate(wanted, divergences.coordinates(axis), values.mean(axis=1))
    return np.minimum.accumulate(np.maximum(found, 0)) if monotone else found


def _interpolate(wanted: Array, known: Array, values: Array) -> Array:
    found: Array = np.interp(wanted, known, np.append(values, 0.0))
    found[wanted < known[0] - 1e-9] = np.inf
    return found
