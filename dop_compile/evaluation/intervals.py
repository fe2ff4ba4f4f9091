"""Confidence intervals of differences between methods that answered the same questions, by the paired bootstrap.

Questions are drawn again within their task, each with both methods' answers, and the mean over tasks of the mean
difference is taken; the interval lies between quantiles of that (percentile bootstrap). Differences of right answers
have three values, so that a task's resampled mean follows from a multinomial draw of how often each occurs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dop_compile.checks import finite, integer

__all__ = ["Difference", "paired_difference"]

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A difference of mean accuracies and its confidence interval, as fractions."""

    value: float
    low: float
    high: float
    confidence: float = CONFIDENCE

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def paired_difference(
    first: Sequence[Any],
    second: Sequence[Any],
    tasks: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Difference:
    """Mean over tasks of the accuracy of `first` less that of `second`.

    Args:
        first, second: (samples,) whether each answer is right, or any score.
        tasks: (samples,) the task of each.
        resamples: how often samples are drawn again.
        confidence: of the interval, 0 < confidence < 1.
        seed: of the draws.

    Raises:
        ValueError: lengths that differ, no samples, or a confidence out of range.
    """
    resamples = integer("resamples", resamples, low=1)
    if not 0 < finite("confidence", confidence) < 1:
        raise ValueError(f"confidence: expected 0 < confidence < 1, got {confidence}")
    if not len(first) == len(second) == len(tasks) or not len(tasks):
        raise ValueError(
            f"expected scores and a task for each of the same samples, got {len(first)} and {len(second)} scores and "
            f"{len(tasks)} tasks"
        )
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    names = np.asarray(tasks)
    rng = np.random.default_rng(seed)
    own, drawn = [], []
    for name in dict.fromkeys(tasks):
        values, times = np.unique(differences[names == name], return_counts=True)
        total = int(times.sum())
        own.append(float(values @ times) / total)
        drawn.append(rng.multinomial(total, times / total, size=resamples) @ values / total)
    low, high = np.quantile(np.mean(drawn, axis=0), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Difference(float(np.mean(own)), float(low), float(high), confidence)
