"""Whole policies on samples: right answers, interruption, several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from dop_compile import Policy, dop_compile
from dop_compile.search import joint, measure_accuracy, measure_policies
from tests.search import worker
from tests.support import shared_model

COUNT = 4


def decode(ids: Tensor) -> str:
    return " ".join(map(str, ids.tolist()))


def questions() -> list[dict[str, Any]]:
    """Prompts whose right answers are what the model says under the first policy, or under the second one."""
    model = shared_model("llava")
    found = []
    for number, inputs in enumerate(worker.prompts(COUNT)):
        compiled = dop_compile(model, worker.POLICIES[number % 2], backend="eager")
        output = compiled.generate(**inputs, do_sample=False, max_new_tokens=3)
        found.append({**inputs, "answers": ["other", decode(output[0, inputs["input_ids"].shape[1] :])]})
    return found


def test_answers_are_those_of_generate() -> None:
    samples = questions()
    found = measure_accuracy(shared_model("llava"), samples, worker.POLICIES, decode, max_new_tokens=3)
    assert found.dtype == bool
    assert found.shape == (3, COUNT)
    for row, policy in enumerate(worker.POLICIES):
        compiled = dop_compile(shared_model("llava"), policy, backend="eager")
        for column, sample in enumerate(samples):
            inputs = {name: value for name, value in sample.items() if name != "answers"}
            output = compiled.generate(**inputs, do_sample=False, max_new_tokens=3)
            answer = decode(output[0, inputs["input_ids"].shape[1] :])
            assert found[row, column] == (answer in sample["answers"])
    assert found[0, 0], "right under the policy that gave the answer"
    assert not found.all()


class Interrupted(list[Any]):
    """Samples of which the third is not reached."""

    def __getitem__(self, number: Any) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return super().__getitem__(number)


@pytest.mark.parametrize("what", ["policies", "accuracy"])
def test_interrupted_it_goes_on_where_it_was(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples, path = shared_model("llava"), questions(), tmp_path / "results" / "joint.json"

    def run(given: list[Any], resume: Path | None) -> Any:
        if what == "policies":
            return measure_policies(model, given, worker.POLICIES, resume=resume)
        return measure_accuracy(model, given, worker.POLICIES, decode, max_new_tokens=3, resume=resume)

    expected = run(samples, None)
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(samples), path)
    add, added = joint.Progress.add, []
    monkeypatch.setattr(joint.Progress, "add", lambda self, n, row: (added.append(n), add(self, n, row)))
    assert np.array_equal(run(samples, path), expected)
    assert added == [2, 3]
    assert np.array_equal(run(samples, path), expected)
    assert added == [2, 3], "nothing is measured again"


def test_another_measurement_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "joint.json"
    worker.measure_joint(2, path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for changes, named in (
        ({"policies": worker.POLICIES[:2]}, "policies differ"),
        ({"metric": "kl"}, "metric differ"),
    ):
        with pytest.raises(ValueError, match=named):
            worker.measure_joint(2, path, **changes)
    with pytest.raises(ValueError, match="samples differ"):
        worker.measure_joint(3, path)
    with pytest.raises(ValueError, match="sample 0 is not the one"):
        measure_policies(shared_model("llava"), worker.prompts(2)[::-1], worker.POLICIES, resume=path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.conformance
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    ranks = [
        worker.processes().Process(target=worker.measure_joint_as_rank, args=(n, 2, 3, tmp_path)) for n in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        assert rank.exitcode == 0
    expected = worker.measure_joint(3, None)
    for number in range(2):
        assert np.array_equal(np.load(tmp_path / f"rank-{number}.npy", allow_pickle=False), expected)
    assert len(list(tmp_path.glob("joint.json.progress-*"))) == 2, "both have measured"


def test_a_sample_without_answers_is_named() -> None:
    samples = questions()[:1] + worker.prompts(1)
    with pytest.raises(ValueError, match="sample 1: it has no answers"):
        measure_accuracy(shared_model("llava"), samples, [Policy.full(4)], decode)
