"""Compare token reducers, pruning inside the decoder, and DOP on a shipped model at equal FLOPs.

    python examples/compare_methods.py llava --questions 200

1. Every method is brought to each budget by computing its FLOPs on the questions that are asked.
2. DOP works on a reducer. The best three are chosen on training canvases, on which DOP is measured, too.
3. All methods answer the same validation questions. Controls: uniform and random tokens, and smaller pictures.

Writes evaluation.json, a Markdown table, a picture and the measured divergences to --out. All of it can be interrupted
and goes on with the same command; under torchrun every process takes its share of the questions.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).parent))

from digits_vlm import data, models
from dop_compile import UnsupportedUsageError, dop_compile
from dop_compile.evaluation import Evaluation, Method, Planner, count_tokens, evaluate, method_names
from dop_compile.evaluation.report import markdown, tradeoff_figure
from dop_compile.hf.model_path import placeholder_ids
from dop_compile.reducers import known, resize_processor
from dop_compile.search import InfeasibleBudgetError, measure_attention, measure_divergences

BUDGETS = (0.5, 0.37, 0.28, 0.23)
CONTROLS = ("uniform", "random")
APART = ("original", "full", "dop", "split", "resize")
"""What needs more than a name and a budget."""
ANSWER_TOKENS = 5
LEARNT = {"qwen2_5_vl": ("read", "row")}
"""It guesses the other kinds of question."""
FIT_SAMPLES = 25
"""Training canvases that FitPrune is fitted to."""


class Questions(Sequence[dict[str, Any]]):
    """Questions about digits as a model's inputs, read when they are asked for."""

    def __init__(self, asked: Sequence[data.Example], reader: models.Reader, device: torch.device):
        self._asked, self._reader, self._device = asked, reader, device

    def __len__(self) -> int:
        return len(self._asked)

    def __getitem__(self, number: Any) -> Any:
        example = self._asked[number]
        inputs = self._reader([example.image], [example.prompt])
        moved = {name: value.to(self._device) for name, value in inputs.items()}
        return {**moved, "answers": [example.answer], "task": example.kind}


def smaller(
    questions: Questions, asked: Sequence[data.Example], reader: models.Reader, visual_tokens: int
) -> Questions:
    """The same questions about pictures of at most so many visual tokens."""
    other = copy.copy(reader)
    other.images = resize_processor(reader.images, visual_tokens)
    return Questions(asked, other, questions._device)


def counted(model: Any, questions: Sequence[dict[str, Any]]) -> list[tuple[int, int, int]]:
    """System, visual and text tokens by their ids; the model need not run."""
    found = []
    ids = torch.tensor(placeholder_ids(model.config))
    for sample in questions:
        visual = torch.isin(sample["input_ids"][0].cpu(), ids)
        system = int(visual.int().argmax())
        found.append((system, int(visual.sum()), len(visual) - system - int(visual.sum())))
    return found


def made(make: Callable[..., Method], *arguments: Any) -> list[Method]:
    """A method, unless no setting of it meets the budget."""
    try:
        return [make(*arguments)]
    except InfeasibleBudgetError as error:
        print(f"left out: {error}", file=sys.stderr)
        return []


def fitting(names: Sequence[str], model: Any, sample: dict[str, Any], planner: Planner) -> list[str]:
    """Those methods that can work on this model: a reducer may want to know what its vision tower does not tell."""
    inputs = {name: value for name, value in sample.items() if name not in ("answers", "task")}
    found = []
    for name in names:
        try:
            compiled = dop_compile(model, planner.named(name, 0.9).policy, backend="eager")
            compiled.generate(**inputs, max_new_tokens=1)
            found.append(name)
        except UnsupportedUsageError as error:
            print(f"left out: {error}", file=sys.stderr)
    return found


def everything() -> list[str]:
    """All reducers, and all that rank inside the decoder, by name; `Planner.named` knows any other method as well."""
    return [name for name in method_names() if name not in APART]


def best(result: Evaluation, count: int) -> list[str]:
    """The reducers that keep most of the accuracy, mean over budgets; controls are not among them."""
    scores: dict[str, list[float]] = {}
    for row in result.rows():
        if row.name in known() and row.name not in CONTROLS:
            scores.setdefault(row.name, []).append(row.relative_average or row.mean_accuracy)
    # A reducer that cannot meet a budget has fewer scores, and is not compared
    most = max(map(len, scores.values()))
    ranked = sorted((sum(own), name) for name, own in scores.items() if len(own) == most)
    return [name for _, name in reversed(ranked[-count:])]


def summary(result: Evaluation, tasks: Sequence[str]) -> str:
    """Rel. Avg. over tasks by method and budget (Markdown); "-" where no setting of a method meets the budget."""
    rows = result.rows()
    original = rows[0].accuracy
    budgets = sorted({row.budget for row in rows if row.budget is not None}, reverse=True)
    found = {
        (row.name, row.budget): sum(row.accuracy[task] / original[task] for task in tasks) / len(tasks) for row in rows
    }
    lines = ["| method | " + " | ".join(f"{100 * budget:g} %" for budget in budgets) + " |"]
    lines.append("| --- |" + " --- |" * len(budgets))
    for name in dict.fromkeys(name for name, budget in found if budget is not None):
        shares = [found.get((name, budget)) for budget in budgets]
        cells = ["-" if share is None else f"{100 * share:.1f} %" for share in shares]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


@contextmanager
def processes() -> Iterator[bool]:
    """The process group of `torchrun`, if it started this process; yields whether this is the first process."""
    if "WORLD_SIZE" not in os.environ:
        yield True
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=models.NAMES)
    parser.add_argument("--checkpoint", type=Path, help="default: the shipped one")
    parser.add_argument("--budget", type=float, action="append", help=f"fraction of FLOPs; default {BUDGETS}")
    parser.add_argument(
        "--method", action="append", help="default: every reducer, all inside the decoder, the controls"
    )
    parser.add_argument("--questions", type=int, default=200, help="validation questions of each kind (%(default)s)")
    parser.add_argument("--samples", type=int, default=100, help="training canvases to choose and measure on")
    parser.add_argument("--best", type=int, default=3, help="reducers that DOP works on (%(default)s)")
    parser.add_argument("--out", type=Path, help="default: compare_methods/MODEL")
    options = parser.parse_args()
    out = options.out or Path("compare_methods") / options.model
    budgets = options.budget or BUDGETS
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    with processes() as first:
        result = compare(options, budgets, out)
        if first:
            text = markdown(result)
            (out / "table.md").write_text(text + "\n")
            (out / "summary.md").write_text(summary(result, LEARNT.get(options.model, data.KINDS)) + "\n")
            tradeoff_figure(result).savefig(out / "tradeoff.png", dpi=120)
            print(text)


def compare(options: argparse.Namespace, budgets: Sequence[float], out: Path) -> Evaluation:
    shipped = Path(__file__).parent / "digits_vlm" / "checkpoints" / options.model
    model, reader = models.load(options.checkpoint or shipped)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    model = model.to(device)
    settings: dict[str, Any] = {
        "decode": lambda ids: reader.tokenizer.decode(ids, skip_special_tokens=True),
        "max_new_tokens": ANSWER_TOKENS,
    }
    drawn = list(data.examples("train", options.samples, seed=5))
    training = Questions(drawn, reader, device)
    counts = count_tokens(model, training, resume=out / "tokens-training")
    shares = measure_attention(model, [training[number] for number in range(min(FIT_SAMPLES, len(training)))])
    planner = Planner.of(model, counts, shares=shares)
    names = fitting(options.method or everything(), model, training[0], planner)
    alone = [(name, budget) for name in names for budget in budgets]
    tried = [method for name, budget in alone for method in made(planner.named, name, budget)]
    chosen = evaluate(model, training, tried, counts=counts, resume=out / "training.json", **settings)
    on = best(chosen, options.best)
    print(f"best on {options.samples} training canvases: {', '.join(on)}", file=sys.stderr)

    asked = list(data.examples("validation", options.questions * len(data.KINDS), seed=1))
    questions = Questions(asked, reader, device)
    counts = count_tokens(model, questions, resume=out / "tokens")
    planner = Planner.of(model, counts, shares=shares)
    methods = [method for name, budget in alone for method in made(planner.named, name, budget)]
    for reducer in on:
        divergences = measure_divergences(model, training, reducer=reducer, resume=out / f"divergences-{reducer}.json")
        own = Planner.of(model, counts, divergences=divergences)
        for space in ("dop", "split"):
            methods += [method for budget in budgets for method in made(own.searched, space, budget, reducer)]

    def resized(most: int) -> Questions:
        return smaller(questions, asked, reader, most)

    try:
        for budget in budgets:
            methods += made(planner.resized, budget, resized, lambda given: counted(model, given))
    except TypeError as error:  # pictures of one size
        print(f"left out: resize: {error}", file=sys.stderr)
    return evaluate(model, questions, methods, counts=counts, resume=out / "evaluation.json", **settings)


if __name__ == "__main__":
    main()
