"""Paired bootstrap intervals against SciPy's and against drawing samples one by one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dop_compile.evaluation import paired_difference


def answers(seed: int, count: int, share: float) -> list[bool]:
    return (np.random.default_rng(seed).random(count) < share).tolist()


def test_one_task_gives_scipys_percentile_interval() -> None:
    first, second = answers(0, 300, 0.8), answers(1, 300, 0.7)
    found = paired_difference(first, second, ["t"] * 300, resamples=40_000, seed=3)
    expected = stats.bootstrap(
        (np.array(first, float), np.array(second, float)),
        lambda a, b, axis=-1: (a - b).mean(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=40_000,
        batch=2_000,
        method="percentile",
        rng=np.random.default_rng(4),
    ).confidence_interval
    assert found.value == pytest.approx(np.mean(first) - np.mean(second))
    # Both are quantiles of 40,000 draws of a mean whose standard error is about 0.035
    assert found.low == pytest.approx(expected.low, abs=0.004)
    assert found.high == pytest.approx(expected.high, abs=0.004)
    # Pairs matter: with itself a method has no difference, though answers differ between samples
    same = paired_difference(first, first, ["t"] * 300)
    assert (same.value, same.low, same.high, same.is_clear) == (0, 0, 0, False)


def test_tasks_are_drawn_apart_and_weigh_the_same() -> None:
    tasks = ["a"] * 12 + ["b"] * 60 + ["c"]
    first, second = answers(5, 73, 0.9), answers(6, 73, 0.4)
    found = paired_difference(first, second, tasks, resamples=20_000, confidence=0.8, seed=1)
    draw, means = np.random.default_rng(2), []
    rows = [[n for n, task in enumerate(tasks) if task == name] for name in "abc"]
    own = [float(a) - float(b) for a, b in zip(first, second, strict=True)]
    for _ in range(4000):
        drawn = [[own[members[i]] for i in draw.integers(0, len(members), len(members))] for members in rows]
        means.append(sum(sum(values) / len(values) for values in drawn) / 3)
    assert found.value == pytest.approx(sum(sum(own[n] for n in members) / len(members) for members in rows) / 3)
    low, high = np.quantile(means, [0.1, 0.9])
    assert found.low == pytest.approx(low, abs=0.012)
    assert found.high == pytest.approx(high, abs=0.012)
    assert found.confidence == 0.8


def test_it_is_seeded_and_signed() -> None:
    first, second, tasks = answers(0, 50, 0.9), answers(1, 50, 0.3), ["a", "b"] * 25
    scores = np.random.default_rng(2).random(50).tolist()  # so that no two draws have the same mean
    one, again, other = (paired_difference(scores, second, tasks, resamples=500, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one.low != other.low
    back = paired_difference(second, first, tasks, resamples=20_000)
    forth = paired_difference(first, second, tasks, resamples=20_000)
    assert forth.is_clear
    assert back.is_clear
    assert back.value == -forth.value
    assert back.high == pytest.approx(-forth.low, abs=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first": [True]}, "1 and 2 scores"),
        ({"first": [], "second": [], "tasks": []}, "same samples"),
        ({"confidence": 1.0}, "0 < confidence < 1"),
        ({"resamples": 0}, "resamples"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    settings: dict[str, object] = {"first": [True, False], "second": [True, True], "tasks": ["a", "a"], **change}
    with pytest.raises(ValueError, match=message):
        paired_difference(**settings)  # type: ignore[arg-type]
