"""Published policies that drop visual tokens inside the decoder, for a decoder of any depth.

Each is a `Policy` with a `Ranking`: it compiles, caches and explains like any other. Depths are given for the 32 layers
of the publications and scaled to the decoder's. Kept tokens keep their positions; PyramidDrop and SparseVLM re-number
them, and SparseVLM adds tokens that are merged of dropped ones, which is not done here. FitPrune's policy is fitted to
samples: `dop_compile.search.fit_prune`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dop_compile.checks import finite, integer
from dop_compile.policy.policy import Policy
from dop_compile.policy.ranking import Ranking, Stage

__all__ = ["dart", "fastv", "pyramiddrop", "sparsevlm", "sparsevlm_fractions"]

PUBLISHED_LAYERS = 32
PUBLISHED_TOKENS = 576
SPARSEVLM_LAYERS = (2, 6, 15)
SPARSEVLM_SCHEDULES = {64: (66, 30, 17), 128: (303, 110, 36), 192: (300, 200, 110)}
"""What stays of 576 tokens after each stage, by the number that the publication calls the schedule."""


def fastv(num_layers: int, fraction: float = 0.5, *, layers: int | None = None) -> Policy:
    """FastV: after the first `layers` (K=2 of 32), the visual tokens that the last token attends to most.

    Args:
        fraction: of the visual tokens that stay (1 - R).
    """
    return _ranked(num_layers, Ranking("last_token", (Stage(_early(num_layers, layers), fraction=fraction),)))


def pyramiddrop(num_layers: int, ratio: float = 0.5, *, stages: int = 3) -> Policy:
    """PyramidDrop: `ratio` of the visual tokens stay after each of `stages` at even depths (8, 16, 24 of 32).

    Ranked by the attention of the prompt's last token in the layer that follows, before it runs, to all tokens left.
    """
    layers = integer("num_layers", num_layers, low=2)
    stages = integer("stages", stages, low=1, high=layers - 1)
    depths = [(number + 1) * layers // (stages + 1) for number in range(stages)]
    found = (Stage(depth - 1, fraction=ratio ** (number + 1)) for number, depth in enumerate(depths))
    return _ranked(layers, Ranking("last_token", tuple(found), (("next_layer", True),)))


def sparsevlm_fractions(tokens: float) -> tuple[float, ...]:
    """SparseVLM's schedule for a number of tokens: the fractions of the visual tokens that stay after each stage.

    Args:
        tokens: of 576, on average, by the publication's count. 64, 128 and 192 give the published schedules; between
            them each stage is interpolated, and beyond them all are those of the nearest times one factor, at most 1.
    """
    if not finite("tokens", tokens) >= 0:
        raise ValueError(f"tokens: expected a number of at least 0, got {tokens}")
    known = sorted(SPARSEVLM_SCHEDULES)
    nearest = min(max(tokens, known[0]), known[-1])
    kept = [np.interp(nearest, known, [SPARSEVLM_SCHEDULES[n][stage] for n in known]) for stage in range(3)]
    return tuple(min(float(count) / PUBLISHED_TOKENS * (tokens / nearest), 1.0) for count in kept)


def sparsevlm(num_layers: int, fractions: Sequence[float] | None = None) -> Policy:
    """SparseVLM: after layers 2, 6 and 15 (of 32, from 0), by the attention of the text tokens that rate.

    Args:
        fractions: of the visual tokens that stay after each of the three (`sparsevlm_fractions`); the default is the
            schedule that the publication calls 128 tokens.
    """
    if fractions is None:
        fractions = sparsevlm_fractions(128)
    layers = integer("num_layers", num_layers, low=len(SPARSEVLM_LAYERS) + 1)
    if len(fractions) != len(SPARSEVLM_LAYERS):
        raise ValueError(f"fractions: expected {len(SPARSEVLM_LAYERS)}, got {len(fractions)}")
    stages: list[Stage] = []
    for published, fraction in zip(SPARSEVLM_LAYERS, fractions, strict=True):
        after = stages[-1].layer + 1 if stages else 0
        room = layers - 2 - (len(SPARSEVLM_LAYERS) - 1 - len(stages))
        scaled = math.floor(published * layers / PUBLISHED_LAYERS + 0.5)
        stages.append(Stage(min(max(scaled, after), room), fraction=fraction))
    return _ranked(layers, Ranking("text_raters", tuple(stages)))


def dart(
    num_layers: int,
    fraction: float = 1 / 3,
    *,
    layers: int | None = None,
    visual_pivots: int = 4,
    text_pivots: int = 4,
) -> Policy:
    """DART: after the first `layers` (2 of 32), the pivots and what is least like them.

    Args:
        fraction: of the visual tokens that stay.
    """
    options = (("text", text_pivots), ("visual", visual_pivots))
    stage = Stage(_early(num_layers, layers), fraction=fraction)
    return _ranked(num_layers, Ranking("pivots", (stage,), options))


def _early(num_layers: int, layers: int | None) -> int:
    """The layer behind which methods rank that do so once, early."""
    num_layers = integer("num_layers", num_layers, low=2)
    if layers is None:
        layers = max(2 * num_layers // PUBLISHED_LAYERS, 1)
    return integer("layers", layers, low=1, high=num_layers - 1) - 1


def _ranked(num_layers: int, ranking: Ranking) -> Policy:
    return Policy.full(num_layers).replace(ranking=ranking)
