"""Search policies for a shipped model and compare them at equal FLOPs, by accuracy per kind of question.

    python examples/search_policies.py llava --samples 100 --questions 200

Writes divergences, policies, curves and a Markdown table to --out. Profiling and the greedy search can be interrupted
and go on.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.append(str(Path(__file__).parent))

from digits_vlm import data, models
from digits_vlm.evaluate import accuracy
from dop_compile import Policy, dop_compile
from dop_compile.search import (
    InfeasibleBudgetError,
    OperationOrder,
    greedy_order,
    measure_divergences,
    measure_policies,
    optimize,
)
from dop_compile.search.candidates import tokens_only
from dop_compile.search.report import curves_figure, describe, pareto_figure, policies_table, policy_row

BUDGETS = (0.5, 0.37, 0.28, 0.23)


def greedy_policy(order: OperationOrder, budget: float) -> Policy | None:
    """The order's policy for a budget; None where all that it may prune leaves more than that."""
    try:
        return order.policy(budget)
    except InfeasibleBudgetError as error:
        print(f"GSOP: {error}")
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=models.NAMES)
    parser.add_argument("--checkpoint", type=Path, help="default: the shipped one")
    parser.add_argument("--samples", type=int, default=100, help="training canvases to profile on (%(default)s)")
    parser.add_argument("--questions", type=int, default=200, help="validation questions of each kind (%(default)s)")
    parser.add_argument("--greedy", type=int, default=25, help="of the samples, for GSOP (%(default)s)")
    parser.add_argument("--verify-top", type=int, default=8, help="candidates measured jointly (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("search_policies"))
    options = parser.parse_args()
    shipped = Path(__file__).parent / "digits_vlm" / "checkpoints" / options.model
    model, reader = models.load(options.checkpoint or shipped)
    options.out.mkdir(parents=True, exist_ok=True)

    samples = [
        {**reader([e.image], [e.prompt]), "answers": [e.answer]}
        for e in data.examples("train", options.samples, seed=5)
    ]
    started = time.perf_counter()
    divergences = measure_divergences(model, samples, resume=options.out / f"divergences-{options.samples}.json")
    seconds = time.perf_counter() - started
    print(describe(divergences), f"\nmeasured in {seconds:.0f} s")
    curves_figure(divergences).savefig(options.out / "divergences.png", dpi=120)

    order = greedy_order(model, samples[: options.greedy], resume=options.out / f"order-{options.greedy}.json")
    print(f"GSOP: {order.evaluations} evaluations of {options.greedy} samples")

    def per_sample(policies: Any) -> Any:
        return measure_policies(model, samples, policies)

    def joint(policies: Any) -> Any:
        return per_sample(policies).mean(axis=1)

    best = f"best of {options.verify_top}"
    paper: dict[str, Any] = {"faithful": True}
    verified: dict[str, Any] = {"faithful": True, "verify_top": options.verify_top, "measure": joint}
    tiers: dict[str, Policy] = {"original": Policy.full(divergences.num_layers)}
    for budget in BUDGETS:
        alone = tokens_only(divergences, budget)
        assert alone is not None, "every number of tokens was measured"
        tiers[f"{budget:.0%} tokens only"] = alone.policy
        tiers[f"{budget:.0%} DOP"] = optimize(divergences, budget, space="dop", **paper)
        tiers[f"{budget:.0%} DOP, {best}"] = optimize(divergences, budget, space="dop", **verified)
        tiers[f"{budget:.0%} split"] = optimize(divergences, budget, **paper)
        tiers[f"{budget:.0%} split, {best}"] = optimize(divergences, budget, **verified)
        tiers[f"{budget:.0%} default"] = optimize(divergences, budget, measure=per_sample)
        if (greedy := greedy_policy(order, budget)) is not None:
            tiers[f"{budget:.0%} GSOP"] = greedy
    measured = joint(list(tiers.values()))
    rows = [
        policy_row(divergences, name, policy, float(value))
        for (name, policy), value in zip(tiers.items(), measured, strict=True)
    ]
    print(policies_table(rows))
    pareto_figure([row for row in rows if row.name.endswith(("split", "original"))], "top_k_kl").savefig(
        options.out / "pareto.png", dpi=120
    )
    for name, policy in tiers.items():
        policy.save(options.out / f"{name.replace('%', '').replace(',', '').replace(' ', '-')}.json")

    compiled = dop_compile(model, {name: p.replace(provenance=None) for name, p in tiers.items()}, backend="eager")
    asked = list(data.examples("validation", options.questions * len(data.KINDS), seed=1))
    lines = [
        f"{options.model}, {options.samples} samples, {options.questions} validation questions a kind; PyTorch "
        f"{torch.__version__}, transformers {transformers.__version__}, {platform.machine()}",
        "",
        "| policy | policy FLOPs | measured divergence | " + " | ".join(data.KINDS) + " | mean, of the original's |",
        "| --- | --- | --- |" + " --- |" * (len(data.KINDS) + 1),
    ]
    base: dict[str, float] = {}
    for row in rows:
        found = accuracy(compiled.tier(row.name), reader, asked)
        base = base or found
        share = sum(found[kind] / base[kind] for kind in data.KINDS) / len(data.KINDS)
        cells = [row.name, f"{row.flops:.1%}", f"{row.measured:.4f}", *(f"{found[kind]:.1%}" for kind in data.KINDS)]
        lines.append("| " + " | ".join([*cells, f"{share:.1%}"]) + " |")
        print(lines[-1], flush=True)
    (options.out / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
