"""One model that several processes share, against the same model in one process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dop_compile.search import Divergences, OperationOrder, greedy_order, measure_divergences
from dop_compile.search.processes import Team
from tests.search import worker
from tests.support import shared_model


@pytest.mark.conformance
def test_a_tensor_parallel_model_is_measured_by_all_together(tmp_path: Path) -> None:
    shared_model("llava").save_pretrained(tmp_path / "model")
    ranks = [
        worker.processes().Process(target=worker.measure_tensor_parallel, args=(rank, 2, tmp_path)) for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(180)
        assert rank.exitcode == 0
    plain = measure_divergences(shared_model("llava"), worker.prompts(2), **worker.SETTINGS)
    joint = worker.measure_joint(2, None)
    order = greedy_order(shared_model("llava"), worker.prompts(2), steps=2, max_loss=0.5, salient_fraction=None)
    found = [Divergences.load(tmp_path / f"rank-{rank}.json") for rank in range(2)]
    assert found[0] == found[1] == Divergences.load(tmp_path / "d.json")
    assert found[0].digests == plain.digests
    for axis, rows in plain.values.items():
        assert np.allclose(found[0].values[axis], rows, rtol=1e-4, atol=1e-6), axis
    orders = [OperationOrder.load(tmp_path / f"order-{rank}.json") for rank in range(2)]
    assert orders[0] == orders[1]
    assert orders[0].free == order.free
    assert orders[0].model_fingerprint == order.model_fingerprint == plain.model_fingerprint
    for rank in range(2):
        own = np.load(tmp_path / f"rank-{rank}.npy", allow_pickle=False)
        assert np.allclose(own, joint, rtol=1e-4, atol=1e-6)
    assert not list(tmp_path.glob("*.progress-*"))


def test_a_model_of_some_processes_only_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from dop_compile.search import processes

    class Shared:
        device_mesh = SimpleNamespace(size=lambda: 2)

    model: Any = SimpleNamespace(parameters=lambda: [Shared()])
    monkeypatch.setattr(processes, "DTensor", Shared)
    monkeypatch.setattr(processes, "world", lambda: (3, 4))
    with pytest.raises(ValueError, match="tensor parallel over 2 of 4 processes"):
        Team.of(model)
    monkeypatch.setattr(processes, "world", lambda: (1, 2))
    assert Team.of(model) == Team(rank=0, processes=1, leader=False)
    assert not Team.of(model).writes
