"""Metrics against scipy and torch on the same logits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import entropy
from torch import Tensor

from dop_compile.search.metrics import METRICS, full_kl, is_right, top_k_kl
from tests.drawing import examples

SEEDS = st.integers(0, 2**31)


def logits(rows: int, vocabulary: int, seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def c2_divergence(original: Tensor, pruned: Tensor, tokens: list[int], eps: float = 1e-8) -> float:
    """DOP eq. 9-10 over given tokens; `entropy` normalises both of its arguments."""
    p, q = softmax(original.double().numpy()), softmax(pruned.double().numpy())
    return float(entropy(p[tokens] + eps, q[tokens] + eps))


def largest(original: Tensor, k: int) -> list[int]:
    return np.argsort(-original.double().numpy(), kind="stable")[:k].tolist()


@examples(40)
@given(SEEDS, st.integers(1, 4), st.integers(10, 60), st.integers(1, 12), st.sampled_from([1e-8, 1e-3]))
def test_top_k_kl_is_the_papers_formula(seed: int, rows: int, vocabulary: int, k: int, eps: float) -> None:
    original, pruned = logits(rows, vocabulary, seed), logits(rows, vocabulary, seed + 1)
    per_row = [c2_divergence(p, q, largest(p, k), eps) for p, q in zip(original, pruned, strict=True)]
    assert top_k_kl(original, pruned, k, eps) == pytest.approx(np.mean(per_row), rel=1e-9, abs=1e-12)


def test_the_papers_constants_are_the_defaults() -> None:
    original, pruned = logits(2, 50, 0), logits(2, 50, 1)
    assert top_k_kl(original, pruned) == top_k_kl(original, pruned, k=10, eps=1e-8)
    assert top_k_kl(original, pruned) != top_k_kl(original, pruned, k=11)


@examples(40)
@given(SEEDS, st.integers(1, 9))
def test_a_small_vocabulary_is_compared_whole(seed: int, vocabulary: int) -> None:
    original, pruned = logits(1, vocabulary, seed), logits(1, vocabulary, seed + 1)
    expected = c2_divergence(original[0], pruned[0], list(range(vocabulary)))
    assert top_k_kl(original, pruned, k=10) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_tokens_that_the_pruned_model_rules_out_cost_a_finite_amount() -> None:
    original, pruned = logits(1, 30, 0), logits(1, 30, 1)
    pruned[0, largest(original[0], 3)] = -torch.inf
    expected = c2_divergence(original[0], pruned[0], largest(original[0], 10))
    assert 1 < expected < np.inf
    assert top_k_kl(original, pruned) == pytest.approx(expected, rel=1e-9)


def test_ties_inside_the_chosen_tokens_change_nothing() -> None:
    original, pruned = logits(1, 30, 2), logits(1, 30, 3)
    top = largest(original[0], 4)
    original[0, top] = original.max() + 1
    assert top_k_kl(original, pruned, k=4) == pytest.approx(c2_divergence(original[0], pruned[0], top), rel=1e-9)


def test_of_tokens_tied_for_the_last_places_some_are_chosen() -> None:
    original, pruned = logits(1, 30, 4), logits(1, 30, 5)
    first, tied = largest(original[0], 2), largest(original[0], 5)[2:]
    original[0, tied] = original[0, first].min() - 0.1
    possible = [c2_divergence(original[0], pruned[0], [*first, *pair]) for pair in itertools.combinations(tied, 2)]
    assert any(top_k_kl(original, pruned, k=4) == pytest.approx(value, rel=1e-9) for value in possible)


@pytest.mark.parametrize("metric", [top_k_kl, full_kl])
def test_rows_count_equally(metric: object) -> None:
    original, pruned = logits(3, 40, 6), logits(3, 40, 7)
    single = [metric(original[i : i + 1], pruned[i : i + 1]) for i in range(3)]  # type: ignore[operator]
    assert metric(original, pruned) == pytest.approx(np.mean(single), rel=1e-12)  # type: ignore[operator]
    assert len(set(single)) == 3


@examples(40)
@given(SEEDS, st.integers(1, 4), st.integers(2, 60))
def test_full_kl_is_torchs(seed: int, rows: int, vocabulary: int) -> None:
    original, pruned = logits(rows, vocabulary, seed), logits(rows, vocabulary, seed + 1)
    log_p, log_q = original.double().log_softmax(-1), pruned.double().log_softmax(-1)
    expected = torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    assert full_kl(original, pruned) == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)


@examples(40)
@given(SEEDS, st.floats(-50, 50))
def test_only_differences_of_logits_count(seed: int, shift: float) -> None:
    original, pruned = logits(2, 30, seed).double(), logits(2, 30, seed + 1).double()
    for metric in (top_k_kl, full_kl):
        assert metric(original, original + shift) == pytest.approx(0, abs=1e-9)
        assert metric(original, pruned + shift) == pytest.approx(metric(original, pruned), rel=1e-6)
        assert metric(original, pruned) > 0


def test_it_is_the_originals_distribution_that_weighs() -> None:
    original, pruned = logits(1, 30, 8), logits(1, 30, 9)
    for metric in (top_k_kl, full_kl):
        assert metric(original, pruned) != pytest.approx(metric(pruned, original), rel=1e-3)


def test_low_precision_logits_are_compared_in_double() -> None:
    original, pruned = logits(2, 40, 10).bfloat16(), logits(2, 40, 11).bfloat16()
    for metric in (top_k_kl, full_kl):
        assert metric(original, pruned) == metric(original.double(), pruned.double())


@pytest.mark.parametrize(
    ("answer", "answers", "right"),
    [
        ("7", ["7"], True),
        (" Yes.\n", ["no", "yes"], True),
        ("yes", ["Yes."], True),
        ("STRASSE", ["straße"], True),
        ("17", ["7"], False),
        ("yes, it is", ["yes"], False),
        ("", ["yes"], False),
        ("3.5", ["35"], False),
    ],
)
def test_an_answer_is_right_but_for_case_and_outer_space(answer: str, answers: list[str], right: bool) -> None:
    assert is_right(answer, answers) is right


def test_the_named_metrics() -> None:
    assert {name: (metric.compare, metric.forced) for name, metric in METRICS.items()} == {
        "top_k_kl": (top_k_kl, False),
        "kl": (full_kl, False),
        "forced_kl": (top_k_kl, True),
        "accuracy_drop": (None, False),
    }
    assert all(metric.name == name for name, metric in METRICS.items())
