"""Parts of `benchmarks/gpu.sh`, in small sizes on the processor; what goes wrong in one is among its results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    # Last, where `benchmarks/onnx.py` hides no package
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])


def setting(folder: Path, seconds: float = 600.0) -> Any:
    from gpu.setting import Setting
    from gpu.store import Store
    from gpu.timing import Clock

    return Setting(CPU, tiny=True, rounds=2, clock=Clock(seconds), store=Store(folder, CPU, "bash benchmarks/gpu.sh"))


def rows(folder: Path, part: str, title: str) -> dict[str, Any]:
    table = json.loads((folder / "gpu-cpu.json").read_text())["parts"][part][title]["rows"]
    return {row["name"]: row for row in table}


def test_batches_of_prefill(tmp_path: Path) -> None:
    from gpu.decoding import sweep

    sweep(setting(tmp_path), batches=(1, 2))
    found = rows(tmp_path, "concurrency", "prefill, eager")
    names = [f"batch {batch}: {tier}" for batch in (1, 2) for tier in ("original", "100%", "28%", "28% split")]
    assert list(found) == names
    assert all("error" not in row and row["per_request_ms"] <= row["ms"] for row in found.values())
    assert "| batch 2: 28% split | " in (tmp_path / "gpu-cpu.md").read_text()


def test_first_token_of_every_reducer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu.first_token import PART, first_token
    from gpu.setting import Setting

    monkeypatch.setattr(Setting, "compiler", "eager")
    first_token(setting(tmp_path))
    found = rows(tmp_path, PART, "eager")
    assert "14% cdpruner" in found
    assert not any("error" in row for row in found.values())
    assert found["14% cdpruner"]["eq11"] < found["100%"]["eq11"] == 1


def test_a_contender_that_raises_does_not_stop_the_others() -> None:
    from gpu.timing import Clock, measure

    def broken() -> None:
        raise RuntimeError("out of memory")

    found = measure({"broken": broken, "original": lambda: 1, "other": lambda: 2}, 3, CPU, Clock(60))
    assert found[0] == {"name": "broken", "error": "RuntimeError: out of memory"}
    assert [row["rounds"] for row in found[1:]] == [3, 3]


def test_nothing_is_begun_without_time() -> None:
    from gpu.timing import Clock, measure

    assert measure({"original": lambda: 1}, 3, CPU, Clock(-1)) == [{"name": "original", "error": "no time left"}]


def test_a_token_is_the_difference_of_two_lengths() -> None:
    import time

    from gpu.timing import per_token

    taken = per_token(4)(lambda count: time.sleep(0.02 + 0.01 * count), CPU)
    assert taken.wall == pytest.approx(10, rel=0.5)


def test_parts_of_several_processes_are_in_one_file(tmp_path: Path) -> None:
    setting(tmp_path).store.add("one", "table", [{"name": "a", "ms": 1.0}])
    setting(tmp_path).store.note("two", ended="early")
    parts = json.loads((tmp_path / "gpu-cpu.json").read_text())["parts"]
    assert parts["one"]["table"]["rows"][0]["ms"] == 1.0
    assert parts["two"]["notes"] == {"ended": "early"}
