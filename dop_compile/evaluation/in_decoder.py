"""Policies that rank tokens inside the decoder as one-parameter families, so that a budget decides the parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dop_compile.policy import baselines
from dop_compile.policy.policy import Policy

__all__ = ["FITPRUNE", "IN_DECODER", "RANKED"]

FITPRUNE = "fitprune"
LARGEST_SCHEDULE = 1280
"""More of SparseVLM's tokens than it takes to keep all, and so many that thousandths of it are its 64, 128 and 192."""


def _sparsevlm(num_layers: int, part: float) -> Policy:
    return baselines.sparsevlm(num_layers, baselines.sparsevlm_fractions(part * LARGEST_SCHEDULE))


RANKED: Mapping[str, Callable[[int, float], Policy]] = {
    "fastv": baselines.fastv,
    "pyramiddrop": baselines.pyramiddrop,
    "sparsevlm": _sparsevlm,
    "dart": baselines.dart,
}
"""From a decoder's layers and a number from 0 to 1, with which FLOPs grow: the fraction of visual tokens that the first
stage keeps; of SparseVLM, that of the largest schedule. Between 128 and 192 its first stage keeps fewer (303 to 300 of
576) while the others keep more: there FLOPs grow but for rounding a sample's own stages to whole tokens."""
IN_DECODER = (*RANKED, FITPRUNE)
