"""Other samples, other policies: what the bootstrap finds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from dop_compile import Policy
from dop_compile.search import Divergences, optimize
from dop_compile.search.validation import stability
from tests.search.synthetic import dims_of, divergences_of

LAYERS, VISUAL = 4, 16
AXES = ("mha_depth", "mlp_depth", "mha_query_depth")


def given(kinds: Sequence[int]) -> Divergences:
    """Samples of two kinds: one loses by skipped layers, the other one by missing tokens."""
    points: dict[str, Sequence[int | float]] = {axis: (3, 2, 1, 0) for axis in AXES}
    points["visual_tokens"] = (0.75, 0.5, 0.25, 0.0)
    rising = [0.1, 0.5, 1.0, 2.0]
    values = {
        axis: [
            [value * (1.0 if (axis == "visual_tokens") == bool(kind) else 0.01) for kind in kinds] for value in rising
        ]
        for axis in points
    }
    return divergences_of(points, values, [(1, VISUAL, 2)] * len(kinds), dims_of(LAYERS))


def test_equal_samples_give_one_policy() -> None:
    study = stability(given([0] * 6), 0.5, sizes=(2, 6), draws=9)
    assert study.column("samples") == [2, 6]
    assert study.column("policies") == [1, 1]
    assert study.column("commonest") == [1.0, 1.0]
    assert {value for head in study.heads if head.endswith(" sd") for value in study.column(head)} == {0.0}


def test_single_samples_give_their_own_policies() -> None:
    divergences = given([0, 0, 0, 1])
    settings: dict[str, Any] = {"alpha": None, "space": "dop"}
    own = [optimize(divergences.subset([i]), 0.5, **settings).replace(provenance=None) for i in (0, 3)]
    seen: list[Policy] = []

    def measure(policies: Sequence[Policy]) -> list[float]:
        seen.extend(policies)
        return [1.0 if policy == own[0] else 5.0 for policy in policies]

    study = stability(divergences, 0.5, sizes=(1,), draws=400, measure=measure, **settings)
    assert own[0] != own[1]
    assert sorted(map(repr, seen)) == sorted(map(repr, own)), "each is measured once"
    (row,) = study.rows
    part = float(row[2])  # type: ignore[arg-type]
    assert part == pytest.approx(0.75, abs=0.1)
    named = dict(zip(study.heads, row, strict=True))
    assert named["policies"] == 2
    assert named["loss"] == pytest.approx(part * 1.0 + (1 - part) * 5.0)
    tokens = [VISUAL if p.visual_tokens is None else p.visual_tokens for p in own]
    assert named["visual tokens"] == pytest.approx(part * tokens[0] + (1 - part) * tokens[1])
    assert named["visual tokens sd"] == pytest.approx(np.sqrt(part * (1 - part)) * abs(tokens[0] - tokens[1]))
    depths = [LAYERS - len(p.pruned_layers("visual", "mlp")) for p in own]
    assert named["MLP"] == pytest.approx(part * depths[0] + (1 - part) * depths[1])


def test_more_samples_agree_more() -> None:
    study = stability(given([0, 0, 0, 1]), 0.5, sizes=(1, 40), draws=200, alpha=None, space="dop")
    first, last = study.column("visual tokens sd")
    assert float(last) < 0.6 * float(first)  # type: ignore[arg-type]


def test_the_seed_decides_the_draws() -> None:
    rows = [stability(given([0, 1, 1]), 0.5, sizes=(2,), draws=7, seed=seed).rows for seed in (1, 1, 2)]
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]


@pytest.mark.parametrize(
    ("settings", "message"), [({"sizes": ()}, "sizes"), ({"sizes": (0,)}, "sizes"), ({"draws": 0}, "draws")]
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stability(given([0]), 0.5, **settings)
