"""Predicted prefill times: the formula, the limits that optimise by them, the file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dop_compile.search import InfeasibleBudgetError, LatencyModel, candidates, measure_latency, optimize
from tests.search.synthetic import make_divergences
from tests.support import ONE_IMAGE, make_batch

MODEL = LatencyModel(
    num_layers=4,
    tokens=(0, 4, 8),
    base=10.0,
    modules={"query": (0.0, 1.0, 3.0), "key_value": (0.0, 0.5, 0.4), "mlp": (0.0, -0.1, 2.0)},
    device="a machine",
    backend="eager",
)


def test_times_add_up_by_layers_and_are_linear_between_points() -> None:
    assert MODEL(0, 0, 0, 8) == 10
    assert MODEL(2, 3, 1, 4) == pytest.approx(10 + 2 * 1.0 + 3 * 0.5 + 0)
    assert MODEL(2, 0, 0, 6) == pytest.approx(10 + 2 * 2.0)
    assert MODEL(0, 0, 2, 6) == pytest.approx(10 + 2 * 1.0)


def test_more_tokens_never_take_less() -> None:
    times = [float(MODEL(4, 4, 4, n)) for n in range(9)]
    assert times == sorted(times)
    assert MODEL(0, 1, 0, 8) == pytest.approx(10.5)  # measured as 0.4, which is noise


def test_optimise_within_milliseconds() -> None:
    divergences = make_divergences(layers=4, visual=8)
    bound = 20.0
    best = optimize(divergences, max_ms=bound, latency=MODEL, alpha=None)
    found = [c for c in candidates(divergences, 1.0, alpha=None, max_ms=bound, latency=MODEL, top=10**4)]
    assert found[0].policy.replace(provenance=None) == best.replace(provenance=None)

    def milliseconds(policy: Any) -> float:
        query, keys, mlp = (
            4 - len(policy.pruned_layers("visual", module)) for module in ("mha_query", "mha_key_value", "mlp")
        )
        return float(MODEL(query, keys, mlp, 8 if policy.visual_tokens is None else policy.visual_tokens))

    assert all(milliseconds(candidate.policy) <= bound + 1e-9 for candidate in found)
    free = candidates(divergences, 0.999999, alpha=None, top=10**4)
    allowed = [c.divergence for c in free if milliseconds(c.policy) <= bound]
    assert found[0].divergence <= min(allowed) + 1e-12
    with pytest.raises(InfeasibleBudgetError, match="max_ms: 5 asked for"):
        optimize(divergences, max_ms=5.0, latency=MODEL, alpha=None)
    with pytest.raises(TypeError, match="latency: max_ms needs"):
        optimize(divergences, max_ms=5.0)
    with pytest.raises(ValueError, match="of 9 layers"):
        optimize(divergences, max_ms=50.0, latency=dataclasses.replace(MODEL, num_layers=9))


def test_the_file(tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    MODEL.save(path)
    assert LatencyModel.load(path) == MODEL
    assert [file.name for file in tmp_path.iterdir()] == ["latency.json"]
    for text, message in (("{", "Expecting"), ("{}", "not a file of measured"), ("[]", "not a file of measured")):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"latency\.json: .*{message}"):
            LatencyModel.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": (1, 4, 8)}, "tokens: expected ascending"),
        ({"tokens": (0, 8, 4)}, "tokens: expected ascending"),
        ({"modules": {"mlp": (0.0, 1.0, 2.0)}}, "modules: expected query, key_value, mlp"),
        ({"modules": {**MODEL.modules, "mlp": (0.0, 1.0)}}, "expected 3 times"),
        ({"base": float("nan")}, "finite"),
    ],
)
def test_wrong_values(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MODEL, **change)


def test_measured_on_a_model() -> None:
    batch = make_batch("llava", ONE_IMAGE)
    found = measure_latency(batch.model, batch.inputs, rounds=2, backend="eager")
    assert found.tokens[0] == 0
    assert found.tokens[-1] == int(batch.visual.sum())
    assert found.base > 0
    assert np.isfinite(found(4, 4, 4, np.arange(10))).all()
    text = {name: value[:, -3:] for name, value in batch.inputs.items() if name != "pixel_values"}
    with pytest.raises(ValueError, match="no visual tokens"):
        measure_latency(batch.model, text, rounds=1, backend="eager")
