"""How much the found policy depends on which samples, and how many, were measured (DOP F.1, F.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dop_compile.checks import integer
from dop_compile.policy.policy import Policy
from dop_compile.search.divergences import Divergences
from dop_compile.search.optimize import optimize
from dop_compile.search.validation.study import Cell, Measure, Study, losses_of

__all__ = ["stability"]

_DEPTHS = {"query": "mha_query", "key-value": "mha_key_value", "MLP": "mlp"}


def stability(
    divergences: Divergences,
    budget: float,
    *,
    sizes: Sequence[int] = (10, 25, 50, 100),
    draws: int = 100,
    seed: int = 0,
    measure: Measure | None = None,
    **settings: Any,
) -> Study:
    """Policies that are found with other samples: a bootstrap over those that were measured.

    Per size, `draws` times so many samples are drawn with replacement and the budget's policy is searched for in their
    divergences: nothing is run again.

    Args:
        divergences: of as many samples as there are; sizes may exceed their number.
        budget, settings: as in `dop_compile.search.optimize`.
        sizes: numbers of samples.
        draws: per size.
        measure: gives joint losses of the found policies, if they shall be measured; each is measured once.

    Returns:
        A row per size: how many different policies were found, the share of the commonest, mean and standard deviation
        of the depths and of the visual tokens, and of the loss where there is a `measure`.

    Raises:
        InfeasibleBudgetError: no policy meets the budget.
        ValueError: no sizes; wrong values.
    """
    draws = integer("draws", draws, low=1)
    sizes = [integer("sizes", size, low=1) for size in sizes]
    if not sizes:
        raise ValueError("sizes: expected at least one, got none")
    rng = np.random.default_rng(seed)
    layers, full = divergences.num_layers, divergences.visual_tokens
    found: list[list[Policy]] = []
    for size in sizes:
        drawn = rng.integers(0, len(divergences.digests), size=(draws, size))
        found.append([_search(divergences, row.tolist(), budget, settings) for row in drawn])
    different = list(dict.fromkeys(policy for policies in found for policy in policies))
    losses = None if measure is None else dict(zip(different, losses_of(measure, different).tolist(), strict=True))

    rows, spread = [], []
    for size, policies in zip(sizes, found, strict=True):
        values = [
            [layers - len(policy.pruned_layers("visual", module)) for policy in policies] for module in _DEPTHS.values()
        ]
        values.append([full if policy.visual_tokens is None else policy.visual_tokens for policy in policies])
        if losses is not None:
            values.append([losses[policy] for policy in policies])
        spread.append([(float(np.mean(own)), float(np.std(own))) for own in values])
        commonest = max(map(policies.count, set(policies))) / draws
        rows.append((size, len(set(policies)), commonest, *(number for pair in spread[-1] for number in pair)))
    names = [*_DEPTHS, "visual tokens", *(["loss"] if losses is not None else [])]

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(names), squeeze=False)[0]
        for index, (panel, name) in enumerate(zip(panels, names, strict=True)):
            means, deviations = zip(*(line[index] for line in spread), strict=True)
            panel.errorbar(range(len(sizes)), means, yerr=deviations, marker="o", capsize=3)
            panel.set_xticks(range(len(sizes)), [str(size) for size in sizes])
            panel.set_title(name, fontsize=9)
            panel.grid(alpha=0.3)
        figure.supxlabel("samples")

    title = f"policies within {budget:.1%} of the FLOPs, found in {draws} draws of {len(divergences.digests)} samples"
    heads = ("samples", "policies", "commonest", *(head for name in names for head in (name, f"{name} sd")))
    cells: tuple[tuple[Cell, ...], ...] = tuple(rows)
    return Study(title, heads, cells, draw, (2.4 * len(names), 3))


def _search(divergences: Divergences, samples: list[int], budget: float, settings: dict[str, Any]) -> Policy:
    """The policy that these samples give, without where it is from, so that equal ones are equal."""
    found: Policy = optimize(divergences.subset(samples), budget, faithful=True, **settings)
    return found.replace(provenance=None)
