"""Written directories: their configuration, links, and that nothing half-written or foreign is touched."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from digits_vlm import models
from dop_compile import Policy
from dop_compile.cli import main
from dop_compile.plugins.vllm.llava_names import renamed
from dop_compile.plugins.vllm.section import Section
from dop_compile.plugins.vllm.served import served_config, write_served

CHECKPOINTS = Path(models.__file__).parent / "checkpoints"
LLAVA = CHECKPOINTS / "llava"
POLICY = Policy.depthwise(8, mha_query_depth=2, visual_tokens=48, reducer="random", reducer_options={"seed": 3})


def test_a_directory_has_the_models_files_as_links_and_the_policy(tmp_path: Path) -> None:
    assert write_served(LLAVA, tmp_path / "served", "28%", POLICY) == []
    weights = tmp_path / "served" / "model.safetensors"
    assert weights.samefile(LLAVA / "model.safetensors")
    config = json.loads((tmp_path / "served" / "config.json").read_text())
    assert config["architectures"] == ["DopLlavaForConditionalGeneration"]
    section = Section.from_config(config)
    assert (section.tier, section.policy) == ("28%", POLICY)
    assert section.policy.positions == "original"
    assert section.policy.options == {"seed": 3}
    assert sum(config["text_config"]["rope_parameters"]["mrope_section"]) == 16  # half of a head
    assert os.listdir(tmp_path) == ["served"]


def test_files_are_copied_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(Path, "symlink_to", refuse)
    assert "model.safetensors" in write_served(LLAVA, tmp_path / "served", "28%", POLICY)
    assert (tmp_path / "served" / "model.safetensors").stat().st_size == (LLAVA / "model.safetensors").stat().st_size


def test_positions_are_told_only_where_tokens_are_dropped() -> None:
    config = json.loads((LLAVA / "config.json").read_text())
    whole = served_config(config, "x", Policy.depthwise(8, mlp_depth=2))
    assert "mrope_section" not in whole["text_config"]["rope_parameters"]
    scaled = {**config["text_config"], "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}
    with pytest.raises(ValueError, match="rope_type 'yarn'"):
        served_config({**config, "text_config": scaled}, "x", POLICY)


def test_only_what_the_command_wrote_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "served"
    write_served(LLAVA, target, "a", POLICY)
    with pytest.raises(FileExistsError, match="--force"):
        write_served(LLAVA, target, "b", POLICY)
    write_served(LLAVA, target, "b", POLICY, force=True)
    assert Section.from_config(json.loads((target / "config.json").read_text())).tier == "b"
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="is not a directory that"):
        write_served(LLAVA, tmp_path / "mine", "b", POLICY, force=True)
    with pytest.raises(FileExistsError, match="is the model itself"):
        write_served(target, target, "b", POLICY, force=True)


def test_a_policy_that_cannot_run_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="6 layers"):
        write_served(LLAVA, tmp_path / "served", "x", Policy.full(6))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "version: this release reads"),
        ({"policy": {"format": "other"}}, "dop_compile: "),
        ({"unknown": 1}, "unknown: unknown or missing"),
    ],
)
def test_a_section_is_read_strictly(change: dict[str, object], message: str) -> None:
    section = {**Section("28%", POLICY, "LlavaForConditionalGeneration").to_dict(), **change}
    with pytest.raises(ValueError, match=message):
        Section.from_config({"dop_compile": section})
    with pytest.raises(ValueError, match="no field 'dop_compile'"):
        Section.from_config({})


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    POLICY.save(tmp_path / "p.json")
    command = ["vllm", str(LLAVA), "--policy", f"28%={tmp_path / 'p.json'}", "--out", str(tmp_path / "served")]
    assert main(command) == 0
    assert capsys.readouterr().out == f"saved 28% to {tmp_path / 'served'}\nvllm serve {tmp_path / 'served'}\n"
    assert main(command) == 2
    assert "replace it with --force" in capsys.readouterr().err
    assert main(["vllm", str(LLAVA), "--system-mlp-depth", "3", "--out", str(tmp_path / "other")]) == 2
    assert "system tokens cannot be left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("vision_tower.encoder.layers.0.mlp.fc1.bias", "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"),
        ("model.vision_tower.pre_layrnorm.weight", "model.vision_tower.vision_model.pre_layrnorm.weight"),
        ("vision_tower.vision_model.encoder.layers.0.x", "vision_tower.vision_model.encoder.layers.0.x"),
        ("language_model.model.norm.weight", "language_model.model.norm.weight"),
    ],
)
def test_names_of_transformers_5(name: str, known: str) -> None:
    assert renamed(name) == known
