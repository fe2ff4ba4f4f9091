"""From logits to the next token: greedy, or drawn. numpy alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Sampler", "Sampling", "probabilities"]

Logits = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        temperature: 0 takes the largest logit; else logits are divided by it, and tokens drawn.
        top_k: draw from this many largest logits only (more where the last of them are equal).
        top_p: draw from the fewest tokens that together have at least this probability.
        repetition_penalty: logits of ids that the row already holds are divided by it, negative ones multiplied
            (CTRL, arXiv:1909.05858, section 4.1), also under temperature 0; 1 does nothing. None: the exported
            model's generation configuration says.
        seed: of the draws; each row number of a batch has draws of its own. None: other draws each time.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature: expected 0 (greedy) or a number above, got {self.temperature!r}")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise ValueError(f"top_k: expected a number of tokens >= 1, got {self.top_k!r}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a probability above 0 and at most 1, got {self.top_p!r}")
        penalty = self.repetition_penalty
        if penalty is not None and not (math.isfinite(penalty) and penalty > 0):
            raise ValueError(f"repetition_penalty: expected a number above 0, got {penalty!r}")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ValueError("top_k and top_p restrict what is drawn, and temperature 0 draws nothing; set temperature")


def probabilities(logits: Logits, sampling: Sampling) -> NDArray[np.float64]:
    """(vocabulary,) from which a token is drawn; temperature first, then top-k, then top-p, as transformers does."""
    scaled = logits.astype(np.float64) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < len(scaled):
        smallest = np.partition(scaled, -sampling.top_k)[-sampling.top_k]
        scaled = np.where(scaled >= smallest, scaled, -np.inf)
    found: NDArray[np.float64] = np.exp(scaled - scaled.max())
    found /= found.sum()
    if sampling.top_p is not None and sampling.top_p < 1:
        order = np.argsort(-found, kind="stable")
        before = np.cumsum(found[order]) - found[order]  # probability of what is more likely
        found[order[before >= sampling.top_p]] = 0
        found /= found.sum()
    return found


class Sampler:
    """Chooses tokens of one batch.

    Args:
        prompts: (batch, tokens) ids that the rows begin with.
        valid: (batch, tokens) bool, False on padding.
    """

    def __init__(self, sampling: Sampling, prompts: NDArray[np.int64], valid: NDArray[np.bool_], vocabulary: int):
        self._sampling = sampling
        self._draws = np.random.default_rng(sampling.seed).spawn(len(prompts))
        self._held = np.zeros((len(prompts), vocabulary), dtype=bool)
        for row, (ids, real) in enumerate(zip(prompts, valid, strict=True)):
            self._held[row, ids[real & (ids < vocabulary)]] = True

    def pick(self, logits: Logits) -> NDArray[np.int64]:
        """(batch,) ids for logits (batch, vocabulary), which go into the rows' history."""
        penalty = self._sampling.repetition_penalty
        if penalty is not None and penalty != 1:
            penalised = np.where(logits < 0, logits * penalty, logits / penalty)
            logits = np.where(self._held, penalised, logits)
        if self._sampling.temperature == 0:
            chosen: NDArray[np.int64] = logits.argmax(-1).astype(np.int64)
        else:
            rows = [probabilities(row, self._sampling) for row in logits]
            chosen = np.array([_draw(p, rng) for p, rng in zip(rows, self._draws, strict=True)], dtype=np.int64)
        self._held[np.arange(len(chosen)), chosen] = True
        return chosen


def _draw(p: NDArray[np.float64], rng: np.random.Generator) -> int:
    """One draw takes one number, whatever is drawn: rows go on alike."""
    likely = np.flatnonzero(p)
    number = int(np.searchsorted(np.cumsum(p[likely]), rng.random(), side="right"))
    return int(likely[min(number, len(likely) - 1)])
