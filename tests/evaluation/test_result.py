"""Results: saved and read again, summed up in a table and a picture."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dop_compile import Policy
from dop_compile.evaluation import Evaluation, Run
from dop_compile.evaluation.report import markdown, tradeoff_figure
from dop_compile.evaluation.result import Measured

TASKS = ("read", "count", "read", "count")


def run(right: bool, **changes: Any) -> Run:
    fields = {
        "answer": "7",
        "right": right,
        "changed": False,
        "tokens": 2,
        "flops": 1000,
        "executed_flops": 900,
        "kv_bytes": 4096,
        "vision_ms": 2.0,
        "selection_ms": 0.25,
        "prefill_ms": 8.0,
        "decode_ms": 1.5,
        "memory_bytes": 3 * 2**20,
    }
    return Run(**{**fields, **changes})


def measured(label: str, rights: str, budget: float | None = None, **changes: Any) -> Measured:
    runs = tuple(run(mark == "y", **changes) for mark in rights)
    policy = None if label == "original" else Policy.depthwise(4, mlp_depth=2)
    return Measured(label.split()[0], budget, label, policy, runs)


@pytest.fixture
def result() -> Evaluation:
    environment = {"packages": {"torch": "2", "transformers": "5"}, "device": "a processor", "threads": 3}
    return Evaluation(
        {"model": "Llava", "fingerprint": "f" * 64, "dtype": "float32", "backend": "eager"},
        {**environment, "memory": "peak resident set of the process"},
        TASKS,
        ((1, 16, 5),) * 4,
        (
            measured("original", "yyyn"),
            measured("random 50%", "nyyn", 0.5, changed=True, flops=500, executed_flops=300, decode_ms=None),
            measured("random 30%", "nnnn", 0.3, flops=300, memory_bytes=None),
        ),
        ("a", "b", "c", "d"),
    )


def test_saved_and_read_again(result: Evaluation, tmp_path: Path) -> None:
    result.save(tmp_path / "e.json")
    assert Evaluation.load(tmp_path / "e.json") == result
    document = json.loads((tmp_path / "e.json").read_text())
    assert [row["label"] for row in document["summary"]] == list(result.labels)
    assert document["summary"][1]["accuracy"] == {"read": 0.5, "count": 0.5}


def test_a_row_sums_up(result: Evaluation) -> None:
    row = result.row("random 50%")
    assert row.accuracy == {"read": 0.5, "count": 0.5}
    assert row.mean_accuracy == 0.5
    assert row.relative_average == pytest.approx((0.5 / 1 + 0.5 / 0.5) / 2)
    assert row.difference.value == pytest.approx(0.5 - 0.75)
    assert (row.changed, row.decode_ms, row.memory_bytes) == (4, None, 3 * 2**20)
    assert (row.flops, row.executed_flops, row.kv_bytes) == (0.5, pytest.approx(1 / 3), 1)
    assert result.row("random 30%").memory_bytes is None


def test_medians_and_the_largest_peak() -> None:
    runs = tuple(run(True, prefill_ms=ms, memory_bytes=int(ms)) for ms in (9.0, 1.0, 5.0, 30.0))
    result = Evaluation({}, {}, TASKS, ((1, 2, 3),) * 4, (Measured("original", None, "original", None, runs),))
    row = result.row("original")
    assert (row.prefill_ms, row.memory_bytes) == (7, 30)


def test_the_table(result: Evaluation) -> None:
    lines = markdown(result).splitlines()
    head, _, *rows = [line for line in lines if line.startswith("|")]
    cells = [dict(zip(head.split(" | "), row.split(" | "), strict=True)) for row in rows]
    assert [row["| method"].lstrip("| ") for row in cells] == list(result.labels)
    assert [row["read"] for row in cells] == ["100.0 %", "50.0 %", "0.0 %"]
    assert [row["Rel. Avg."] for row in cells] == ["100.0 %", "75.0 %", "0.0 %"]
    assert [row["policy FLOPs"] for row in cells] == ["100.0 %", "50.0 %", "30.0 %"]
    assert cells[0]["difference (95 %)"] == ""
    change = result.difference("random 50%")
    interval = f"-25.0 ({100 * change.low:+.1f} to {100 * change.high:+.1f})"
    assert cells[1]["difference (95 %)"] == interval
    assert [row["decode ms"] for row in cells] == ["1.5", "-", "1.5"]
    assert "a processor" in lines[0]
    assert "1 kFLOPs and 4 KiB of KV cache" in lines[0]
    assert "peak resident set" in lines[-1]


def test_nothing_right_is_no_ratio(result: Evaluation) -> None:
    other = dataclasses.replace(result, methods=(measured("original", "ynyn"), *result.methods[1:]))
    assert other.relative_average("random 50%") is None
    assert "the original answers nothing right of count" in markdown(other)
    assert tradeoff_figure(other).axes[0].get_ylabel() == "right answers (%)"


def test_the_picture_has_a_line_per_method(result: Evaluation) -> None:
    (panel,) = tradeoff_figure(result).axes
    assert [line.get_label() for line in panel.lines] == ["original", "random"]
    assert panel.lines[1].get_xdata() == pytest.approx([30, 50])
    assert panel.lines[1].get_ydata() == pytest.approx([0, 75])


def test_unknown_names(result: Evaluation) -> None:
    with pytest.raises(ValueError, match=r"method: .*did you mean 'random 50%'"):
        result.row("randon 50%")
    with pytest.raises(ValueError, match="task: expected one of"):
        result.difference("random 50%", task="sum")


def test_other_files(result: Evaluation, tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    document = json.loads(result.to_json())
    method = document["methods"][0]
    for change, message in (
        ({"format": "x"}, "not a file of an evaluation"),
        ({"version": 9}, "reads versions 1, 2 and 3"),
        ({"digests": ["a"]}, "digests: expected one entry for each of 4 samples, got 1"),
        ({"digests": []}, "digests: expected one entry for each of 4 samples, got 0"),
        ({"digests": [1, 2, 3, 4]}, "digests: expected a list of texts"),
        ({"digests": "abcd"}, "digests: expected a list of texts"),
        ({"methods": []}, "expected 'original' first"),
        ({"methods": [method, method]}, "labels that differ"),
        ({"methods": [{**method, "runs": method["runs"][1:]}]}, "one entry for each of 4"),
        ({"methods": [{**method, "runs": [{**one, "x": 1} for one in method["runs"]]}]}, "unexpected keyword"),
        ({"counts": [[1, 2]]}, "not enough values"),
    ):
        path.write_text(json.dumps({**document, **change}))
        with pytest.raises(ValueError, match=rf"e\.json: .*{message}"):
            Evaluation.load(path)
    without = {name: value for name, value in document.items() if name != "digests"}
    path.write_text(json.dumps(without))
    with pytest.raises(ValueError, match="digests: the field is missing"):
        Evaluation.load(path)
    path.write_text(json.dumps({**without, "version": 1}))
    old = Evaluation.load(path)
    assert old == dataclasses.replace(result, digests=None)
    old.save(path)
    assert Evaluation.load(path) == old, "what is not known is not known afterwards either"
    del document["tasks"]
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="tasks: the field is missing"):
        Evaluation.load(path)
