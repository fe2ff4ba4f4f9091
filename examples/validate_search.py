"""Check on a shipped model what the search takes for granted: the studies of DOP's appendices.

    python examples/validate_search.py llava --samples 25

Writes a table and a picture per study to --out, and all tables to studies.md. Divergences and the joint losses of the
two large grids can be interrupted and go on; the kinds of question are the tasks.
"""

from __future__ import annotations

import argparse
import functools
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.append(str(Path(__file__).parent))

from digits_vlm import data, models
from dop_compile import Policy
from dop_compile.search import candidates, measure_accuracy, measure_divergences, measure_policies
from dop_compile.search.validation import (
    Study,
    consecutive_operations,
    cross_task,
    joint_grid,
    rank_correlation,
    stability,
    swapped_operations,
)

BUDGETS = (0.37, 0.28)


def depths(policy: Policy) -> list[int]:
    """In how many layers visual tokens take part in MHA, and in MLP."""
    return [policy.num_layers - len(policy.pruned_layers("visual", module)) for module in ("mha_query", "mlp")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=models.NAMES)
    parser.add_argument("--checkpoint", type=Path, help="default: the shipped one")
    parser.add_argument("--samples", type=int, default=25, help="training canvases (%(default)s)")
    parser.add_argument("--questions", type=int, default=40, help="of each kind, where answers count (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("validate_search"))
    options = parser.parse_args()
    shipped = Path(__file__).parent / "digits_vlm" / "checkpoints" / options.model
    model, reader = models.load(options.checkpoint or shipped)
    options.out.mkdir(parents=True, exist_ok=True)

    def sample(example: data.Example) -> dict[str, Any]:
        return {**reader([example.image], [example.prompt]), "answers": [example.answer]}

    def decode(ids: torch.Tensor) -> str:
        return str(reader.tokenizer.decode(ids, skip_special_tokens=True))

    samples = [sample(e) for e in data.examples("train", options.samples, seed=5)]
    divergences = measure_divergences(model, samples, resume=options.out / "divergences.json")
    joint = functools.partial(measure_policies, model, samples)
    layers = divergences.num_layers
    lines = [
        f"{options.model}, {options.samples} samples; PyTorch {torch.__version__}, transformers "
        f"{transformers.__version__}, {platform.machine()}; python {' '.join(sys.argv)}"
    ]

    def keep(name: str, study: Study) -> None:
        print(study.table(), "\n", flush=True)
        study.figure().savefig(options.out / f"{name}.png", dpi=120)
        lines.append(study.markdown())
        (options.out / "studies.md").write_text("\n\n".join(lines) + "\n")

    keep("ranks", rank_correlation(divergences, functools.partial(joint, resume=options.out / "ranks.json")))
    for budget in BUDGETS:
        name = f"grid-{100 * budget:.0f}"
        measure = functools.partial(joint, resume=options.out / f"{name}.json")
        keep(name, joint_grid(divergences, measure, budget))
        sizes = (5, 10, 25, 50)
        keep(f"stability-{100 * budget:.0f}", stability(divergences, budget, sizes=sizes, draws=50, space="dop"))
        policies = [one.policy for one in candidates(divergences, budget, space="dop", top=(layers + 1) ** 2)]
        # The best one that keeps and prunes layers of both modules: others have nothing to exchange
        policy = next(one for one in policies if all(0 < kept < layers for kept in depths(one)))
        keep(f"swaps-{100 * budget:.0f}", swapped_operations(policy, joint, swaps=(1,)))

    examples = data.examples("validation", options.questions * len(data.KINDS), seed=2)
    by_kind: dict[str, list[dict[str, Any]]] = {kind: [] for kind in data.KINDS}
    for example in examples:
        by_kind[example.kind].append(sample(example))

    def wrong(asked: list[dict[str, Any]], policies: Sequence[Policy]) -> Any:
        return 1.0 - measure_accuracy(model, asked, policies, decode)

    everything = [one for asked in by_kind.values() for one in asked]
    keep("consecutive", consecutive_operations(Policy.full(layers), joint))
    keep("consecutive-wrong", consecutive_operations(Policy.full(layers), functools.partial(wrong, everything)))
    tasks = {
        kind: measure_divergences(
            model,
            [sample(e) for e in data.examples("train", len(data.KINDS) * options.samples, seed=6) if e.kind == kind],
            resume=options.out / f"divergences-{kind}.json",
        )
        for kind in data.KINDS
    }
    measures = {kind: functools.partial(wrong, asked) for kind, asked in by_kind.items()}
    keep("tasks", cross_task(tasks, measures, BUDGETS, space="dop"))


if __name__ == "__main__":
    main()
