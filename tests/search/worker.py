"""What the processes of `test_measure.py` run: measurements that are killed, and measurements of several ranks."""

from __future__ import annotations

import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import LlavaForConditionalGeneration
from transformers.distributed import DistributedConfig

from dop_compile import Policy
from dop_compile.search import Divergences, greedy_order, measure_divergences, measure_policies
from dop_compile.search.axes import DOP_AXES
from tests.support import make_batch, shared_model

torch.set_num_threads(1)  # sums of several threads may round otherwise from run to run
SETTINGS: dict[str, Any] = {
    "axes": DOP_AXES,
    "points": {"mha_depth": (1,), "mlp_depth": (1,), "visual_tokens": (0.5, 0.25)},
    "seed": 7,
}


@functools.cache
def processes() -> Any:
    """Processes forked off a clean one that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def run_ranks(target: Callable[..., None], world: int, *args: Any) -> None:
    """Run target(rank, world, *args) in a process each, and wait for all of them."""
    ranks = [processes().Process(target=target, args=(rank, world, *args)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(180)
        assert process.exitcode == 0


def prompts(count: int) -> list[dict[str, Any]]:
    """Prompts of one or two images, for the tiny LLaVA."""
    rows = [
        [("text", 2 + n % 3), *([("image",), ("text", 2)] if n % 2 else []), ("image", 1), ("text", 3)]
        for n in range(count)
    ]
    return [make_batch("llava", [row], seed=number).inputs for number, row in enumerate(rows)]


class Slow(Sequence[dict[str, Any]]):
    """Samples that take a while to come, so that a process can be killed between two of them."""

    def __init__(self, samples: Sequence[dict[str, Any]]):
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, number: Any) -> Any:
        time.sleep(0.05)
        return self._samples[number]


def measure(count: int, path: Path | None, **changes: Any) -> Divergences:
    return measure_divergences(shared_model("llava"), prompts(count), resume=path, **SETTINGS | changes)


def measure_slowly(count: int, path: Path) -> None:
    measure_divergences(shared_model("llava"), Slow(prompts(count)), resume=path, **SETTINGS)


def measure_as_rank(rank: int, world: int, count: int, folder: Path) -> None:
    """One process of several; saves what it returns."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        found = measure(count, folder / "d.json")
        found.save(folder / f"rank-{rank}.json")
    finally:
        dist.destroy_process_group()


POLICIES = (Policy.depthwise(4, mha_depth=2, visual_tokens=2), Policy.depthwise(4, mlp_depth=1), Policy.full(4))


def measure_joint(count: int, path: Path | None, **changes: Any) -> Any:
    settings: dict[str, Any] = {"policies": POLICIES, "resume": path, **changes}
    return measure_policies(shared_model("llava"), prompts(count), **settings)


def measure_joint_as_rank(rank: int, world: int, count: int, folder: Path) -> None:
    """One process of several; saves what it returns."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        np.save(folder / f"rank-{rank}.npy", measure_joint(count, folder / "joint.json"), allow_pickle=False)
    finally:
        dist.destroy_process_group()


def measure_tensor_parallel(rank: int, world: int, folder: Path) -> None:
    """One process of those that share the model saved in `folder`; saves what it returns."""
    # torchrun sets these, and Hugging Face's loading asks for them
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        parallel = DistributedConfig(tp_plan="auto", tp_size=world)
        model = LlavaForConditionalGeneration.from_pretrained(folder / "model", distributed_config=parallel).eval()
        assert any(isinstance(weight, DTensor) for weight in model.parameters())
        found = measure_divergences(model, prompts(2), resume=folder / "d.json", **SETTINGS)
        found.save(folder / f"rank-{rank}.json")
        np.save(folder / f"rank-{rank}.npy", measure_policies(model, prompts(2), POLICIES), allow_pickle=False)
        order = greedy_order(model, prompts(2), steps=2, max_loss=0.5, salient_fraction=None)
        order.save(folder / f"order-{rank}.json")
    finally:
        dist.destroy_process_group()
