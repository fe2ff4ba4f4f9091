"""What measured curves predict of a policy that is there already: read from a file, or written by hand."""

from __future__ import annotations

import math

from dop_compile.checks import choice
from dop_compile.policy.policy import Policy
from dop_compile.search.axes import VISUAL_TOKENS
from dop_compile.search.curves import curve
from dop_compile.search.divergences import Divergences
from dop_compile.search.space import SPACES

__all__ = ["additive_divergence", "predicted_divergence"]

MODULES = ("mha_query", "mha_key_value", "mlp")


def additive_divergence(
    divergences: Divergences, policy: Policy, space: str = "split", *, monotone: bool = True
) -> float | None:
    """The proxy of a space (`dop_compile.search.space`) for one policy; None where it says nothing of the policy.

    It speaks of visual tokens that take part in each module up to a depth, and of which so many were chosen by the
    reducer that was measured.
    """
    choice("space", space, SPACES)
    depths = _depths(policy)
    if depths is None or not set(SPACES[space]) <= set(divergences.points):
        return None
    base, full = divergences.base, divergences.visual_tokens
    tokens = full if policy.visual_tokens is None else min(policy.visual_tokens, full)
    if tokens < full and any(
        getattr(policy, field) != getattr(base, field) for field in ("reducer", "reducer_options", "positions")
    ):
        return None
    query, keys, mlp = depths
    both, changes = (curve(divergences, axis, monotone=monotone) for axis in ("mha_depth", "mlp_depth"))
    found = both[keys] + curve(divergences, VISUAL_TOKENS, monotone=monotone)[tokens]
    if space == "dop":
        if query != keys:
            return None
        found += changes[mlp]
    else:
        updates = curve(divergences, "mha_query_depth", monotone=monotone)
        for own, depth in ((updates, query), (changes, mlp)):
            if depth < keys:  # what is updated where nobody reads is dead
                found += own[depth] - own[keys]
    return float(found) if math.isfinite(found) else None


def predicted_divergence(divergences: Divergences, policy: Policy) -> float | None:
    """The predicted divergence of a policy by these curves; None where they predict none.

    That which the policy was found by, where it is one of these curves': it is told by its value from another file's.
    Else the paper's proxy where attention has one depth, and that of the split space where it has two.
    """
    stored = policy.provenance.divergence if policy.provenance is not None else None
    known = {
        (space, monotone): additive_divergence(divergences, policy, space, monotone=monotone)
        for space in ("dop", "split")
        for monotone in (True, False)
    }
    for value in known.values():
        if stored is not None and value is not None and math.isclose(stored, value, rel_tol=1e-9, abs_tol=1e-12):
            return stored
    return known["dop", True] if known["dop", True] is not None else known["split", True]


def _depths(policy: Policy) -> tuple[int, int, int] | None:
    """In how many layers visual tokens are queries, keys and values, and in the MLP; None where it is no depth."""
    if policy.salient_fraction is not None or policy.ranking is not None:
        return None
    layers = policy.num_layers
    found = [layers - len(policy.pruned_layers("visual", module)) for module in MODULES]
    plain = Policy.depthwise(layers, mha_query_depth=found[0], mha_key_value_depth=found[1], mlp_depth=found[2])
    return (found[0], found[1], found[2]) if plain.pruned == policy.pruned else None
