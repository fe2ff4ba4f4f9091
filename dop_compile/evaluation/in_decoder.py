"""Policies that rank tokens inside the decoder as one-parameter families, so that a budget decides the parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from dop_compile import baselines
from dop_compile.policy import Policy

__all__ = ["FITPRUNE", "IN_DECODER", "RANKED"]

FITPRUNE = "fitprune"
_POWERS = [math.log(f, baselines.SPARSEVLM_FRACTIONS[0]) for f in baselines.SPARSEVLM_FRACTIONS]


def _sparsevlm(num_layers: int, first: float) -> Policy:
    return baselines.sparsevlm(num_layers, [first**power for power in _POWERS])


RANKED: Mapping[str, Callable[[int, float], Policy]] = {
    "fastv": baselines.fastv,
    "pyramiddrop": baselines.pyramiddrop,
    "sparsevlm": _sparsevlm,
    "dart": baselines.dart,
}
"""From a decoder's layers and the fraction of visual tokens, 0 to 1, that the first stage keeps."""
IN_DECODER = (*RANKED, FITPRUNE)
