"""Tables and pictures of studies, and losses of wrong shapes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from dop_compile import Policy
from dop_compile.search.validation import (
    Study,
    consecutive_operations,
    cross_task,
    joint_grid,
    rank_correlation,
    stability,
    swapped_operations,
)
from tests.search.synthetic import make_divergences

STUDY = Study("a study", ("name", "loss", "note"), (("one", 0.123456, None), ("two", 7, "far")), lambda figure: None)


def test_tables_hold_the_rows() -> None:
    assert STUDY.table().splitlines() == ["a study", "", "name    loss  note", "one   0.1235", "two        7   far"]
    assert STUDY.markdown().splitlines()[2:] == [
        "| name | loss | note |",
        "| --- | --- | --- |",
        "| one | 0.1235 |  |",
        "| two | 7 | far |",
    ]


def test_columns_are_found_by_name() -> None:
    assert STUDY.column("loss") == [0.123456, 7]
    with pytest.raises(ValueError, match="expected one of name, loss, note"):
        STUDY.column("gain")


def measure(policies: Any) -> list[float]:
    return [float(len(policy.pruned)) for policy in policies]


@pytest.mark.parametrize("name", ["ranks", "grid", "stability", "consecutive", "swaps", "tasks"])
def test_every_study_is_drawn(name: str) -> None:
    divergences = make_divergences(4, 8)
    study = {
        "ranks": lambda: rank_correlation(divergences, measure),
        "grid": lambda: joint_grid(divergences, measure, 0.6, token_step=2),
        "stability": lambda: stability(divergences, 0.6, sizes=(2, 3), draws=3, measure=measure),
        "consecutive": lambda: consecutive_operations(Policy.full(4), measure),
        "swaps": lambda: swapped_operations(Policy.depthwise(4, mlp_depth=1), measure, swaps=(1,)),
        "tasks": lambda: cross_task({"a": divergences}, {"a": measure, "b": measure}, (0.6, 0.5)),
    }[name]()
    written = io.BytesIO()
    study.figure().savefig(written, dpi=40)
    assert written.getvalue().startswith(b"\x89PNG")
    assert len(study.table().splitlines()) == 3 + len(study.rows)


@pytest.mark.parametrize("found", [[1.0], np.ones((1, 8)), np.ones((8, 1, 1)), [float("nan")] * 8, np.ones((8, 0))])
def test_losses_of_a_wrong_shape_are_refused(found: Any) -> None:
    with pytest.raises(ValueError, match="measure: expected"):
        consecutive_operations(Policy.full(4), lambda policies: found, lengths=(1,))
