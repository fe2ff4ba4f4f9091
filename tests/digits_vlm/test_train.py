"""Training is resumable and reproducible, alone or shared by processes."""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from digits_vlm import models, train


def options(name: str = "llava", **changes: object) -> argparse.Namespace:
    settings = {"model": name, "seed": 0, "device": "cpu", "tower_steps": 2, "steps": 2, "batch": 2, "questions": 3}
    return argparse.Namespace(**{**settings, "lr": 1e-3, "tower_lr": 1e-3, "refine_steps": 2, **changes})


def weights(training: train.Training) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in training.model.state_dict().items()}


@pytest.mark.parametrize("name", models.NAMES)
def test_an_interrupted_training_ends_with_the_same_model(name: str, tmp_path: Path) -> None:
    whole = train.Training(options(name))
    whole.run(tmp_path / "whole.safetensors")
    path = tmp_path / "parts.safetensors"
    for _ in range(6):  # stopped after every step, in the middle of each stage
        part = train.Training(options(name))
        part.resume(path)
        if part.step == part.steps[part.stage]:
            part.enter(train.STAGES[train.STAGES.index(part.stage) + 1])
        part.train_step()
        part.save(path)
    last = train.Training(options(name))
    last.run(path)
    for key, value in weights(whole).items():
        assert torch.equal(value, weights(last)[key]), key
    untrained = models.build(name).state_dict()
    changed = {key for key, value in weights(whole).items() if not torch.equal(value, untrained[key])}
    assert changed >= {key for key in untrained if "q_proj.weight" in key and "vision" not in key}


def test_other_settings_do_not_go_on_from_a_saved_step(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    train.Training(options()).save(path)
    with pytest.raises(ValueError, match=r"belongs to a training with the settings .*another --out"):
        train.Training(options(lr=2e-3)).resume(path)


def test_steps_of_a_stage_to_come_may_change(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    train.Training(options("llava", steps=0, tower_steps=1, refine_steps=1)).run(path)
    with pytest.raises(ValueError, match="belongs to a training"):
        train.Training(options("llava", steps=0, tower_steps=1)).resume(path)
    path.unlink()
    first = train.Training(options("llava", tower_steps=1))
    first.train_step()
    first.save(path)
    second = train.Training(options("llava", tower_steps=1, steps=7, refine_steps=9))
    second.resume(path)
    assert (second.stage, second.step) == ("tower", 1)
    with pytest.raises(ValueError, match="belongs to a training"):
        train.Training(options("llava", tower_steps=2)).resume(path)


@pytest.mark.conformance
def test_two_processes_average_their_gradients(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port", port]
    steps = ("--tower-steps=2", "--steps=2", "--refine-steps=2", "--tower-lr=1e-3", "--lr=1e-3")
    command += ["-m", "digits_vlm.train", "llava", *steps, "--batch=4", "--questions=3", "--device=cpu"]
    command += ["--out", str(tmp_path / "shared")]
    subprocess.run(command, check=True, cwd=Path(train.__file__).parent.parent, capture_output=True, timeout=200)
    shared = load_file(tmp_path / "shared.training.safetensors")

    alone = train.Training(options(batch=4))
    alone.world = 2
    for stage in train.STAGES:
        alone.enter(stage)
        for _ in range(2):
            for alone.rank in range(2):
                (alone.loss()[0] / 2).backward()
            alone.update()
    for name, value in weights(alone).items():
        # Adam turns the sign of a gradient that is all rounding into a whole step, so single weights may differ
        assert (value - shared[f"model.{name}"]).abs().mean() < 1e-5, name
