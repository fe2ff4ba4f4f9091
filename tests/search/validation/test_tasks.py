"""Policies of one task, measured on another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from dop_compile import Policy
from dop_compile.search import optimize
from dop_compile.search.validation import cross_task
from tests.search.validation.test_stability import given

TASKS = {"deep": given([0, 0]), "wide": given([1, 1])}


def lost_tokens(policies: Sequence[Policy]) -> list[float]:
    return [16.0 - (16 if p.visual_tokens is None else p.visual_tokens) for p in policies]


def lost_operations(policies: Sequence[Policy]) -> list[list[float]]:
    return [[len(p.pruned), 3.0 * len(p.pruned)] for p in policies]


def test_each_tasks_policies_are_measured_on_every_task() -> None:
    study = cross_task(TASKS, {"wide": lost_tokens, "deep": lost_operations}, (0.6, 0.4), alpha=None)
    assert study.heads[-2:] == ("loss on wide", "loss on deep")
    expected = []
    for budget in (0.6, 0.4):
        for task, divergences in TASKS.items():
            policy = optimize(divergences, budget, alpha=None)
            expected.append((budget, task, lost_tokens([policy])[0], 2.0 * len(policy.pruned)))
    assert [(*row[:2], *row[-2:]) for row in study.rows] == expected
    for deep, wide in (study.rows[:2], study.rows[2:]):
        assert deep[-1] < wide[-1], "the policy of a task is the better one there"  # type: ignore[operator]
        assert deep[-2] > wide[-2]  # type: ignore[operator]


def test_tasks_of_different_models_are_refused() -> None:
    other = {**TASKS, "wide": dataclasses.replace(TASKS["wide"], model_fingerprint="0" * 64)}
    with pytest.raises(ValueError, match="one model"):
        cross_task(other, {"wide": lost_tokens}, (0.5,))


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ValueError, match="budgets"):
        cross_task(TASKS, {"wide": lost_tokens}, ())
    with pytest.raises(ValueError, match="measures"):
        cross_task(TASKS, {}, (0.5,))
