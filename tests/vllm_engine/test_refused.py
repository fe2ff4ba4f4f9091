"""Engines that cannot run a policy are refused while they are set up, with what to change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm import EngineArgs

from dop_compile import Policy
from dop_compile.errors import UnsupportedUsageError
from dop_compile.plugins.vllm import internals
from dop_compile.plugins.vllm.engine import check_engine
from dop_compile.plugins.vllm.served import write_served
from tests.vllm_engine.engines import CHECKPOINTS, POLICIES


@pytest.fixture
def served(tmp_path: Path) -> Path:
    write_served(CHECKPOINTS / "llava", tmp_path / "served", "joint", POLICIES["joint"])
    return tmp_path / "served"


def configure(directory: Path, **settings: Any) -> Any:
    return EngineArgs(model=str(directory), dtype="float32", **settings).create_engine_config()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"enable_prefix_caching": True}, "leave --enable-prefix-caching out"),
        ({"pipeline_parallel_size": 2}, "use --tensor-parallel-size"),
        ({"enable_lora": True}, "merge the adapter"),
    ],
)
def test_settings(served: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(served, **settings)


def test_prefix_caching_is_off_unless_asked_for_where_keys_are_left_out(served: Path, tmp_path: Path) -> None:
    assert not configure(served).cache_config.enable_prefix_caching
    write_served(CHECKPOINTS / "llava", tmp_path / "frozen", "frozen", POLICIES["frozen"])
    assert configure(tmp_path / "frozen").cache_config.enable_prefix_caching


def test_the_runner_that_was_not_tried(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(served)
    assert not config.use_v2_model_runner
    monkeypatch.setattr(type(config), "use_v2_model_runner", True)
    with pytest.raises(UnsupportedUsageError, match="leave VLLM_USE_V2_MODEL_RUNNER out"):
        check_engine(config, POLICIES["joint"])


def test_an_unknown_vllm(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.99.1")
    with pytest.raises(ValueError, match=r"vLLM 0\.99\.1 is not one .* Install vLLM 0\.32"):
        configure(served)


def test_another_shape_inside_vllm(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = internals.INTERNALS
    monkeypatch.setattr(internals, "INTERNALS", (replace(first, has=first.has[1:]), *others))
    with pytest.raises(ValueError, match="has the new query_start_loc"):
        configure(served)


def test_a_configuration_changed_by_hand(served: Path) -> None:
    path = served / "config.json"
    config = json.loads(path.read_text())
    config["dop_compile"]["policy"] = json.loads(Policy.depthwise(7, mha_depth=3).to_json())
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the policy is for 7 layers, the model has 8"):
        configure(served)


def test_every_internal_is_as_expected_here() -> None:
    internals.check_internals()
