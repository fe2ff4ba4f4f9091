"""Tables and pictures say what the numbers say."""

from __future__ import annotations

import io

import numpy as np
import pytest

from dop_compile import Policy, prefill_flops
from dop_compile.policy.costs import kv_cache_bytes, policy_tokens
from dop_compile.policy.provenance import Provenance
from dop_compile.search import optimize
from dop_compile.search.predict import predicted_divergence
from dop_compile.search.report import (
    bootstrap_band,
    costs_note,
    curves_figure,
    describe,
    pareto_figure,
    policies_table,
    policy_row,
    tier_maps_figure,
)
from tests.search.synthetic import make_divergences


def test_costs_of_a_row_are_means_over_the_samples() -> None:
    divergences = make_divergences(layers=4, visual=8)
    policy = Policy.depthwise(4, mha_depth=2, mlp_depth=1, visual_tokens=5)
    row = policy_row(divergences, "a", policy, measured=0.5)
    full = Policy.full(4)
    spent, whole = (
        sum(prefill_flops(divergences.dims, p, *counts) for counts in divergences.counts) for p in (policy, full)
    )
    stored = [
        kv_cache_bytes(divergences.dims, policy_tokens(policy, *counts), divergences.dtype_bytes)
        for counts in divergences.counts
    ]
    assert row.flops == pytest.approx(spent / whole)
    assert row.kv_bytes == pytest.approx(np.mean(stored))
    assert (row.predicted, row.measured) == (predicted_divergence(divergences, policy), 0.5)
    known = policy.replace(provenance=Provenance(divergence=7.0, measured_divergence=0.25))
    assert policy_row(divergences, "a", known).measured == 0.25
    assert policy_row(divergences, "a", known).predicted == row.predicted, "what these curves say, not the file"


def test_the_table_holds_depths_tokens_and_only_known_columns() -> None:
    divergences = make_divergences(layers=4, visual=8)
    policy = Policy.depthwise(4, mha_query_depth=1, mha_key_value_depth=3, mlp_depth=2, visual_tokens=5)
    text = policies_table([policy_row(divergences, "a", policy), policy_row(divergences, "b", Policy.full(4))])
    head, first, second = text.splitlines()
    assert first.split()[:5] == ["a", "1", "3", "2", "5"]
    assert second.split()[:5] == ["b", "-", "-", "-", "all"]
    assert "policy FLOPs" in head
    assert "predicted divergence" in head
    assert "measured" not in head
    assert "accuracy" not in head


def test_the_note_says_at_which_counts_costs_are() -> None:
    divergences = make_divergences(layers=4, visual=8)
    assert "3 samples, 2 system + 8 visual + 4.333 text tokens" in costs_note(divergences)


def test_the_description_names_every_point() -> None:
    divergences = make_divergences(layers=4, visual=8)
    text = describe(divergences)
    for axis in divergences.points:
        (line,) = [line for line in text.splitlines() if line.startswith(f"{axis} ")]
        assert line.count(":") == len(divergences.points[axis]) + 1


def test_the_band_is_the_bootstraps() -> None:
    values = np.random.default_rng(0).exponential(size=(3, 40))
    low, high = bootstrap_band(values)
    mean, error = values.mean(axis=1), values.std(axis=1) / 40**0.5
    assert (low < mean).all()
    assert (high > mean).all()
    assert np.allclose(high - low, 2 * 1.96 * error, rtol=0.15)
    constant = np.ones((2, 5))
    assert [band.tolist() for band in bootstrap_band(constant)] == [[1, 1], [1, 1]]


def test_figures_are_drawn() -> None:
    divergences = make_divergences(layers=4, visual=8)
    rows = [policy_row(divergences, f"{b:g}", optimize(divergences, b, alpha=None), 0.1) for b in (1.0, 0.7)]
    curves = curves_figure(divergences)
    shown = {line.get_label(): line.get_xydata() for axes in curves.axes for line in axes.lines}
    assert len(shown) == len(divergences.points)
    expected = np.stack([divergences.coordinates("mlp_depth"), divergences.means("mlp_depth")], axis=1)
    assert np.allclose(shown["MLP"], expected)
    pareto = pareto_figure(rows, "top_k_kl")
    measured = next(line for line in pareto.axes[0].lines if line.get_label() == "measured divergence")
    assert np.allclose(sorted(measured.get_xdata()), sorted(100 * row.flops for row in rows))
    for figure in (curves, pareto, tier_maps_figure(rows, 8)):
        file = io.BytesIO()
        figure.savefig(file, format="png")
        assert file.getvalue().startswith(b"\x89PNG")
