"""`compiled.tiers`, and the line of `repr(compiled)` that names them."""

from __future__ import annotations

from typing import Any

import pytest

from dop_compile import Policy
from tests.support import compile_eagerly, shared_model

TIERS = {"100%": Policy.full(4), "few": Policy.depthwise(4, mlp_depth=2)}


def test_tiers_are_shown_and_cannot_be_changed() -> None:
    compiled: Any = compile_eagerly(shared_model("llava"), TIERS)
    for view in (compiled, compiled.tier("few")):
        assert dict(view.tiers) == TIERS
        assert list(view.tiers) == list(TIERS)
        with pytest.raises(TypeError):
            view.tiers["other"] = Policy.full(4)
    assert "tiers" not in vars(shared_model("llava"))


def test_the_repr_is_the_models_with_a_line_of_tiers() -> None:
    model: Any = shared_model("llava")
    before = repr(model)
    compiled: Any = compile_eagerly(model, TIERS)
    for view, line in (
        (compiled, "compiled by dop_compile, tiers: '100%' (default), 'few'"),
        (compiled.tier("few"), "compiled by dop_compile, tiers: '100%', 'few' (default)"),
    ):
        first, second, *rest = repr(view).splitlines()
        assert second.strip() == line
        assert [first, *rest] == before.splitlines()
        assert view._get_name() == type(model).__name__, "what Trainer looks up"
    assert repr(model) == before
