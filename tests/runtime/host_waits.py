"""How often the host would wait for a GPU: once in a prefill, twice where values decide, never for a token."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dop_compile import Policy
from dop_compile.drop_in.structure import Structure
from dop_compile.policy import baselines
from tests.stand_in_device import Wait, move_to_stand_in, on_cpu, stand_in_device, waiting
from tests.support import compile_eagerly, make_batch

ROWS = {
    1: [[("text", 4), ("image",), ("text", 6)]],
    2: [[("text", 4), ("image",), ("text", 6)], [("text", 2), ("image",), ("text", 3)]],
}
BUDGET = {"full": 1, "uniform": 1, "split": 1, "visionzip": 5, "cdpruner": 3, "fastv": 2}
"""Waits of a prefill, by policy.

Of reducers that read what the vision tower made: whether its rows are the projector's, and for those that merge tokens
whether a single token can be projected, and whether each row of features is free of NaN.
"""


def policies(layers: int, visual: int) -> dict[str, Policy]:
    depths = {"mha_depth": layers - 1, "mlp_depth": 1, "visual_tokens": visual}
    return {
        "full": Policy.full(layers),
        "uniform": Policy.depthwise(layers, **depths),
        "split": Policy.depthwise(layers, mha_query_depth=1, mha_key_value_depth=layers - 1, mlp_depth=1),
        "visionzip": Policy.depthwise(layers, **depths, reducer="visionzip"),
        "cdpruner": Policy.depthwise(layers, **depths, reducer="cdpruner"),
        "fastv": baselines.fastv(layers, 0.5, layers=1),
    }


class Stand:
    """A compiled model on the CPU, and what it does on the stand-in device."""

    def __init__(self) -> None:
        self.batches = {count: make_batch("llava", rows) for count, rows in ROWS.items()}
        batch = self.batches[1]
        self.compiled = compile_eagerly(copy.deepcopy(batch.model), policies(batch.family.num_layers, 5), debug=False)
        self.expected = {(c, tier): self.tokens(c, tier, 4) for c in ROWS for tier in self.compiled.tiers}
        move_to_stand_in(self.compiled.dop.original.model)

    def tokens(self, count: int, tier: str, length: int) -> torch.Tensor:
        inputs = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in self.batches[count].inputs.items()}
        settings = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
        result: torch.Tensor = self.compiled.generate(**inputs, **settings, tier=tier)
        return result

    def waits(self, count: int, tier: str, length: int) -> tuple[torch.Tensor, list[Wait]]:
        with torch.no_grad(), waiting() as found:
            inputs = {name: value.to(stand_in_device()) for name, value in self.batches[count].inputs.items()}
            found.clear()
            settings = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
            result = self.compiled.generate(**inputs, **settings, tier=tier)
            noted = [wait for wait in found if wait.ours]
        return on_cpu(result), noted


@pytest.fixture(scope="module")
def stand() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        made = Stand()
        patch.setattr(Structure, "holds", lambda self: True)  # programs are those that were built on the CPU
        yield made


@pytest.mark.parametrize("count", ROWS)
@pytest.mark.parametrize("tier", BUDGET)
def test_waits(stand: Any, tier: str, count: int) -> None:
    tokens, prefill = stand.waits(count, tier, 1)
    assert len(prefill) <= BUDGET[tier], "\n".join(f"{wait.kind} at {wait.place}" for wait in prefill)
    tokens, all_waits = stand.waits(count, tier, 4)
    assert torch.equal(tokens, stand.expected[count, tier])
    later = all_waits[len(prefill) :]
    assert not later, "\n".join(f"{wait.kind} at {wait.place}" for wait in later)


def test_the_stand_in_sees_waits() -> None:
    with waiting() as found:
        there = torch.arange(3).to(stand_in_device())
        there.sum().item()
        there.tolist()
        there[there > 1]
        there.cpu()
        torch.arange(3).to(stand_in_device(), non_blocking=True)
    kinds = [wait.kind for wait in found]
    assert kinds == ["copy to the device", "value read", "value read", "boolean index", "copy to the host"]
