"""Whether a policy that was found on one task serves another (DOP Table 4, Table 20)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dop_compile.policy.policy import Policy
from dop_compile.search.divergences import Divergences
from dop_compile.search.optimize import optimize
from dop_compile.search.validation.study import Cell, Measure, Study, losses_of

__all__ = ["cross_task"]


def cross_task(
    divergences: Mapping[str, Divergences],
    measures: Mapping[str, Measure],
    budgets: Sequence[float],
    **settings: Any,
) -> Study:
    """The loss on each task of policies that were found on each task.

    Args:
        divergences: per task, of one model.
        measures: per task, those that losses are wanted of; they need not be the same tasks.
        budgets, settings: as in `dop_compile.search.optimize`.

    Returns:
        A row per budget and task of the search: the policy's depths and tokens, and its loss on every task.

    Raises:
        InfeasibleBudgetError: no policy meets a budget.
        ValueError: no tasks, measures or budgets; divergences of different models.
    """
    for name, given in (("divergences", divergences), ("measures", measures), ("budgets", budgets)):
        if not len(given):
            raise ValueError(f"{name}: expected at least one, got none")
    models = {own.model_fingerprint for own in divergences.values()}
    if len(models) > 1:
        raise ValueError("divergences: expected those of one model, got several; measure all tasks on the same model")
    found = [
        (budget, task, optimize(own, budget, faithful=True, **settings).replace(provenance=None))
        for budget in budgets
        for task, own in divergences.items()
    ]
    different = list(dict.fromkeys(policy for _, _, policy in found))
    losses = {
        task: dict(zip(different, losses_of(measure, different).tolist(), strict=True))
        for task, measure in measures.items()
    }
    rows: list[tuple[Cell, ...]] = [
        (budget, task, *_kept(policy), *(losses[other][policy] for other in measures)) for budget, task, policy in found
    ]

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(budgets), squeeze=False)[0]
        for panel, budget in zip(panels, budgets, strict=True):
            table = [[losses[other][p] for other in measures] for b, _, p in found if b == budget]
            shown = panel.imshow(table, cmap="viridis")
            panel.set_xticks(range(len(measures)), list(measures), rotation=45, ha="right")
            panel.set_yticks(range(len(divergences)), list(divergences))
            panel.set_title(f"budget {budget:.0%}", fontsize=9)
            panel.set_xlabel("measured on")
            figure.colorbar(shown, ax=panel, label="loss")
        panels[0].set_ylabel("found on")

    title = f"policies found on each of {len(divergences)} tasks, measured on {len(measures)}"
    heads = ("budget", "found on", "queries", "keys", "MLP", "tokens", *(f"loss on {other}" for other in measures))
    return Study(title, heads, tuple(rows), draw, (4.2 * len(budgets), 3.8))


def _kept(policy: Policy) -> tuple[Cell, ...]:
    """Depths of the visual queries, key-values and MLP, and the visual tokens."""
    modules = ("mha_query", "mha_key_value", "mlp")
    depths = (policy.num_layers - len(policy.pruned_layers("visual", module)) for module in modules)
    return (*depths, "all" if policy.visual_tokens is None else policy.visual_tokens)
