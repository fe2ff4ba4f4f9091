"""`--model_args`: which policy, which device; and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dop_compile import Policy, save_policies
from dop_compile.plugins.lmms_eval.arguments import batch_size_of, check_names, device_of, dtype_of, policy_of

MINE = Policy.depthwise(8, mha_depth=6, visual_tokens=40)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A policy's file, and a directory of two tiers."""
    MINE.save(tmp_path / "mine.json")
    save_policies({"all": Policy.full(8), "mine": MINE}, tmp_path / "tiers")
    return tmp_path


def test_a_policy_is_named_in_one_way(folder: Path) -> None:
    nowhere = str(folder)
    assert policy_of(nowhere, 8, {"policy": str(folder / "mine.json")}) == MINE
    assert policy_of(nowhere, 8, {"tiers": str(folder / "tiers"), "tier": "mine"}) == MINE
    assert policy_of(nowhere, 8, {"tiers": str(folder / "tiers")}) == Policy.full(8)
    assert policy_of(str(folder / "tiers"), 8, {"tier": "mine"}) == MINE  # beside the model
    assert policy_of(nowhere, 8, {"mha_depth": 6, "visual_tokens": 40, "reducer": None}) == MINE
    assert policy_of(nowhere, 8, {"policy": "full"}) == Policy.full(8)
    assert policy_of(nowhere, 8, {"policy": "original"}) is None
    options = {"visual_tokens": 4, "reducer": "random", "reducer_options": {"seed": 3}, "positions": "compact"}
    assert policy_of(nowhere, 8, options) == Policy.depthwise(8, **options)


def test_what_is_wrong_with_a_policy(folder: Path) -> None:
    nowhere, file, tiers = str(folder), str(folder / "mine.json"), str(folder / "tiers")
    for given, message in (
        ({}, "holds no dop_compile.json, and no policy is named; give policy=FILE"),
        ({"policy": file, "mha_depth": 3}, "policy and mha_depth are given; name the policy in one way"),
        ({"policy": file, "tier": "mine"}, "give tiers=DIRECTORY"),
        ({"policy": str(folder / "none.json")}, "policy: .*No such file"),
        ({"policy": tiers}, "is a directory; give tiers="),
        ({"tiers": tiers, "tier": "mime"}, "did you mean 'mine'"),
        ({"mha_depth": 9}, "mha_depth"),
        ({"visual_tokens": 3, "reducer": "divprun"}, "did you mean 'divprune'"),
        ({"visual_tokens": 3, "reducer": "random", "reducer_options": {"sed": 1}}, "accepted: seed"),
    ):
        with pytest.raises(ValueError, match=message):
            policy_of(nowhere, 8, given)
    with pytest.raises(ValueError, match="the policy is for 8 layers, the model has 4"):
        policy_of(nowhere, 4, {"policy": file})


def test_names_of_arguments() -> None:
    check_names(["policy", "mha_depth", "backend"], ["backend"])
    with pytest.raises(TypeError, match=r"unknown argument 'mha_dept'; did you mean 'mha_depth'\? Known are backend"):
        check_names(["mha_dept"], ["backend"])


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_of("cpu", None, 0, 1) == device_of(None, "cpu", 1, 2) == torch.device("cpu")
    with pytest.raises(ValueError, match="start one process per GPU"):
        device_of(None, "auto", 0, 1)
    with pytest.raises(ValueError, match="name two devices"):
        device_of("cpu", "cuda:0", 0, 1)
    with pytest.raises(ValueError, match="expected a device of torch"):
        device_of("gpu", None, 0, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of(None, None, 0, 1) == torch.device("cuda")
    assert device_of("cuda:1", None, 0, 1) == torch.device("cuda:1")
    assert device_of("cuda", None, 3, 4) == torch.device("cuda:3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="finds no CUDA device"):
        device_of("cuda", None, 0, 1)


def test_numbers_and_types() -> None:
    assert batch_size_of("4") == 4
    for wrong in ("auto", "0", "x"):
        with pytest.raises(ValueError, match="expected a number of at least 1"):
            batch_size_of(wrong)
    assert dtype_of("bfloat16") is torch.bfloat16
    assert dtype_of("auto") == "auto"
    for name in ("int8", "float31", "nn"):
        with pytest.raises(ValueError, match="expected auto, float32"):
            dtype_of(name)
