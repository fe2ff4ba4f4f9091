"""Whether the sum of three divergences ranks policies as their joint divergence does (DOP E.1, F.3)."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from scipy.stats import rankdata, spearmanr

from dop_compile.checks import finite, integer
from dop_compile.policy.policy import Policy
from dop_compile.search.axes import DOP_AXES, VISUAL_TOKENS, tokens_kept
from dop_compile.search.costs import FlopsModel
from dop_compile.search.curves import curve
from dop_compile.search.divergences import Divergences
from dop_compile.search.limits import InfeasibleBudgetError, alpha_of, minimal_tokens
from dop_compile.search.optimize import optimize
from dop_compile.search.space import Space
from dop_compile.search.validation.study import Measure, Study, losses_of

__all__ = ["joint_grid", "rank_correlation"]


def rank_correlation(divergences: Divergences, measure: Measure) -> Study:
    """Spearman's rank correlation of additive and joint divergence over all combinations of the measured points
    (DOP E.1, Table 7: at least 0.799 for LLaVA-1.5-7B and LLaVA-NeXT-7B over 6 x 6 x 6 points).

    Args:
        divergences: with the axes `mha_depth`, `mlp_depth` and `visual_tokens`.
        measure: the joint losses, on the same samples.

    Returns:
        A row per combination: its depths, tokens, additive and joint divergence and their ranks; rho and its p-value
        are in the title.

    Raises:
        ValueError: an axis was not measured.
    """
    curves = [curve(divergences, axis, monotone=False) for axis in _axes(divergences)]
    layers, visual = divergences.num_layers, divergences.visual_tokens
    depths = [[int(point) for point in divergences.points[axis]] for axis in DOP_AXES if axis != VISUAL_TOKENS]
    tokens = [tokens_kept(point, visual) for point in divergences.points[VISUAL_TOKENS]]
    combinations = list(itertools.product(*depths, tokens))
    additive = np.array([sum(own[at] for own, at in zip(curves, each, strict=True)) for each in combinations])
    joint = losses_of(measure, [_policy(divergences, *each) for each in combinations])
    result = spearmanr(additive, joint)
    rho, p_value = float(result.statistic), float(result.pvalue)
    title = f"additive and joint divergence of {len(combinations)} policies: Spearman's rho {rho:.3f}, p {p_value:.1e}"
    found = (values.tolist() for values in (additive, joint, rankdata(additive), rankdata(joint)))
    rows = tuple((*each, *numbers) for each, *numbers in zip(combinations, *found, strict=True))

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        shown = panel.scatter(additive, joint, c=[row[0] for row in rows], s=12, vmin=0, vmax=layers)
        panel.set_xlabel("additive divergence")
        panel.set_ylabel("joint divergence")
        panel.set_title(f"rho = {rho:.3f}")
        panel.grid(alpha=0.3)
        figure.colorbar(shown, label="MHA depth")

    heads = ("mha_depth", "mlp_depth", "visual_tokens", "additive", "joint", "additive rank", "joint rank")
    return Study(title, heads, rows, draw)


def joint_grid(
    divergences: Divergences,
    measure: Measure,
    budget: float,
    *,
    depth_step: int = 2,
    token_step: int = 16,
    alpha: float | str | None = "auto",
) -> Study:
    """The best policy by joint divergence of every policy on a grid, against the additive optimum (DOP F.3).

    The grid has the depths 1, 1 + `depth_step`, ... and the visual tokens 0, `token_step`, ...; of it are measured all
    policies that meet the budget and the least number of tokens (DOP C.4).

    Args:
        divergences: with the axes `mha_depth`, `mlp_depth` and `visual_tokens`.
        measure: the joint losses, on the same samples.
        budget, alpha: as in `dop_compile.search.optimize`.

    Returns:
        Three rows: the additive optimum of the whole space, that of the grid, and the joint optimum of the grid; with
        their additive and joint divergence, and the rank of the joint one among the grid's.

    Raises:
        InfeasibleBudgetError: no policy of the grid meets the budget.
        ValueError: an axis was not measured; wrong values.
    """
    depth_step, token_step = integer("depth_step", depth_step, low=1), integer("token_step", token_step, low=1)
    budget = finite("budget", budget)
    if not 0 < budget <= 1:
        raise ValueError(f"budget: expected a fraction of FLOPs kept, 0 < budget <= 1, got {budget}")
    _axes(divergences)
    layers, full = divergences.num_layers, divergences.visual_tokens
    flops = FlopsModel(divergences.dims, divergences.counts, full)
    least = minimal_tokens(flops, layers, full, budget, alpha_of(divergences, alpha))
    depths, tokens = np.arange(1, layers + 1, depth_step), np.arange(0, full + 1, token_step)
    both, mlp, n = (axis.ravel() for axis in np.meshgrid(depths, depths, tokens, indexing="ij"))
    inside = (flops(both, both, mlp, n) <= budget * flops.original * (1 + 1e-12)) & (n >= least)
    if not inside.any():
        raise InfeasibleBudgetError(
            f"no policy of the grid meets the budget {budget:g} with at least {least} visual tokens; take smaller steps"
        )
    both, mlp, n = both[inside], mlp[inside], n[inside]
    space = Space(divergences, "dop", True)
    additive = space.divergence.reshape(layers + 1, layers + 1)[both, mlp] + space.tokens[n]
    best = optimize(divergences, budget, space="dop", alpha=alpha, faithful=True)
    source = best.provenance
    assert source is not None
    policies = [_policy(divergences, *map(int, one)) for one in zip(both, mlp, n, strict=True)]
    measured = losses_of(measure, [*policies, best.replace(provenance=None)])
    joint, of_best = measured[:-1], float(measured[-1])
    chosen = {"additive optimum of the grid": int(additive.argmin()), "joint optimum of the grid": int(joint.argmin())}

    def place(value: float) -> int:
        return int((joint < value).sum()) + 1

    def kept(module: str) -> int:
        return layers - len(best.pruned_layers("visual", module))

    entering = full if best.visual_tokens is None else best.visual_tokens
    rows = [("additive optimum", kept("mha_query"), kept("mlp"), entering, source.divergence, of_best, place(of_best))]
    for name, i in chosen.items():
        value = float(joint[i])
        rows.append((name, int(both[i]), int(mlp[i]), int(n[i]), float(additive[i]), value, place(value)))

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        panel.scatter(additive, joint, s=12, color="0.6", label="policies of the grid")
        for row in rows:
            panel.scatter(row[4], row[5], label=row[0], zorder=3)
        panel.set_xlabel("additive divergence")
        panel.set_ylabel("joint divergence")
        panel.set_title(f"budget {budget:.0%}")
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)

    title = f"joint search over {len(policies)} policies within {budget:.1%} of the FLOPs"
    heads = ("policy", "mha_depth", "mlp_depth", "visual_tokens", "additive", "joint", "joint rank")
    return Study(title, heads, tuple(rows), draw)


def _axes(divergences: Divergences) -> tuple[str, ...]:
    for axis in DOP_AXES:
        divergences.array(axis)
    return DOP_AXES


def _policy(divergences: Divergences, both: int, mlp: int, tokens: int) -> Policy:
    pruned = Policy.depthwise(divergences.num_layers, mha_depth=both, mlp_depth=mlp).pruned
    visual = None if tokens >= divergences.visual_tokens else tokens
    return divergences.base.replace(pruned=pruned, visual_tokens=visual)
