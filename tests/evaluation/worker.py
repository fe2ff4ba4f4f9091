"""What the processes of `test_measuring.py` run, and the questions that it asks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dop_compile import Policy, dop_compile
from dop_compile.evaluation import Evaluation, Method, evaluate
from tests.search.worker import prompts
from tests.support import shared_model

torch.set_num_threads(1)  # sums of several threads may round otherwise from run to run
TOKENS = 3
SMALL = Policy.depthwise(4, mha_depth=2, mlp_depth=1, visual_tokens=2, reducer="random")
METHODS = (Method("small", 0.4, SMALL), Method("full", None, Policy.full(4)))
TASKS = ("read", "count", "read", "read", "count")


def decode(ids: Tensor) -> str:
    return " ".join(map(str, ids.tolist()))


def plain_answer(model: Any, inputs: dict[str, Any]) -> str:
    with torch.no_grad():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
    return decode(output[0, inputs["input_ids"].shape[1] :])


@cache
def said() -> tuple[tuple[str, str], ...]:
    """Per question, what the untouched model says, and the pruned one."""
    model = shared_model("llava")
    pruned = dop_compile(model, SMALL, backend="eager")
    return tuple((plain_answer(model, inputs), plain_answer(pruned, inputs)) for inputs in prompts(len(TASKS)))


def questions() -> list[dict[str, Any]]:
    """The right answer is the original's, the pruned model's, or neither; one is right but for its full stop."""
    right = [["other", said()[0][0]], [said()[1][1]], ["other"], [f" {said()[3][0]}. "], [said()[4][0]]]
    return [
        {**inputs, "answers": answers, "task": task}
        for inputs, answers, task in zip(prompts(len(TASKS)), right, TASKS, strict=True)
    ]


def compare(samples: Sequence[Any], path: Path | None, **changes: Any) -> Evaluation:
    settings: dict[str, Any] = {"methods": METHODS, "decode": decode, "resume": path, "max_new_tokens": TOKENS}
    return evaluate(shared_model("llava"), samples, **{**settings, **changes})


def compare_as_rank(rank: int, world: int, folder: Path) -> None:
    """One process of several; saves what it returns."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        compare(questions(), folder / "e.json").save(folder / f"rank-{rank}.json")
    finally:
        dist.destroy_process_group()
