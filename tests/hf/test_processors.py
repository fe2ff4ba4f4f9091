"""Processors of which a part lacks a package: the rest works as the whole, and what lacks it says so."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf

from digits_vlm import data, models
from dop_compile.hf import processors
from dop_compile.hf.processors import MissingPart, load_processor
from dop_compile.hf.prompts import prompt_inputs
from tests.command_line import refused, run

CHECKPOINTS = Path(models.__file__).parent / "checkpoints"
QWEN = CHECKPOINTS / "qwen2_5_vl"
QUESTION = "Which digit is in row 1 column 2?"
picture = functools.cache(lambda: data.canvas("validation", 0).image)


def lacking(monkeypatch: pytest.MonkeyPatch, *autos: str, error: type[Exception] = ImportError) -> None:
    """Let parts fail to load as without torchvision, whether or not it is installed."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error("This requires the Torchvision library, which is to be installed")

    # In the module that is asked, and not their attributes: where torchvision is missing the classes are placeholders
    for auto in autos:
        monkeypatch.setattr(processors.hf, auto, SimpleNamespace(from_pretrained=fail))


def whole_fails(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(processors.hf, "AutoProcessor", SimpleNamespace(from_pretrained=fail))


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Any:
    lacking(monkeypatch, "AutoVideoProcessor", "AutoProcessor")
    return load_processor(QWEN)


def test_text_and_images_are_those_of_the_checkpoints_own_reader(processor: Any) -> None:
    assert type(processor) is hf.Qwen2_5_VLProcessor
    found = prompt_inputs(processor, QUESTION, [picture()])
    expected = models.Reader(QWEN)([picture()], [data.prompt(QUESTION)])
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert copy.deepcopy(processor).chat_template == processor.chat_template


def test_the_missing_part_says_why_when_it_is_used(processor: Any) -> None:
    assert isinstance(processor.video_processor, MissingPart)
    with pytest.raises(ImportError, match=r"video_processor is not there: .*Torchvision"):
        processor(text="<|video_pad|>", videos=[torch.zeros(2, 3, 48, 48)])
    with pytest.raises(AttributeError, match=r"video_processor\.merge_size is not there: .*Torchvision"):
        _ = processor.video_processor.merge_size


def test_a_saved_processor_keeps_the_missing_parts_settings(processor: Any, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "processor_config.json").read_text())
    assert written["video_processor"] == json.loads((QWEN / "video_preprocessor_config.json").read_text())
    again = prompt_inputs(load_processor(tmp_path), QUESTION, [picture()])
    for name, value in prompt_inputs(processor, QUESTION, [picture()]).items():
        assert torch.equal(again[name], value), name


def test_the_class_is_found_by_the_configuration_where_no_file_names_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for file in QWEN.iterdir():
        if file.name not in ("model.safetensors", "processor_config.json"):
            shutil.copy(file, tmp_path)
    lacking(monkeypatch, "AutoVideoProcessor", "AutoProcessor")
    assert type(load_processor(tmp_path)) is hf.Qwen2_5_VLProcessor


def test_a_part_that_is_needed_is_refused_by_the_packages_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lacking(monkeypatch, "AutoImageProcessor", "AutoVideoProcessor", "AutoProcessor")
    with pytest.raises(ImportError, match="Torchvision"):
        load_processor(QWEN)
    message = refused(capsys, "run", str(QWEN), "--prompt", "x", "--mha-depth", "3")
    assert str(QWEN) in message
    assert "Torchvision" in message


def test_other_failures_are_not_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole_fails(monkeypatch, ValueError("damaged"))
    with pytest.raises(ValueError, match="damaged"):
        load_processor(QWEN)
    whole_fails(monkeypatch, ImportError("no package"))
    lacking(monkeypatch, "AutoVideoProcessor", error=KeyError)
    with pytest.raises(KeyError, match="Torchvision"):
        load_processor(QWEN)


def test_a_package_may_be_missed_by_a_value_error(monkeypatch: pytest.MonkeyPatch) -> None:
    whole_fails(monkeypatch, ValueError("requires `torchvision` to be installed"))
    lacking(monkeypatch, "AutoVideoProcessor", error=ValueError)
    assert isinstance(load_processor(QWEN).video_processor, MissingPart)


def test_a_whole_processor_is_transformers_own() -> None:
    assert type(load_processor(CHECKPOINTS / "llava")) is type(hf.AutoProcessor.from_pretrained(CHECKPOINTS / "llava"))


def test_run_answers_with_the_shipped_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lacking(monkeypatch, "AutoVideoProcessor", "AutoProcessor")
    example = next(one for one in data.examples("validation", 20, seed=7) if one.kind == "read")
    example.image.save(tmp_path / "canvas.png")
    question = example.prompt.split("<image> ")[1].removesuffix(" Answer:")
    full = ["--mha-depth", "8", "--max-new-tokens", "3"]
    code, out, _ = run(capsys, "run", str(QWEN), "--image", str(tmp_path / "canvas.png"), "--prompt", question, *full)
    assert (code, out.strip()) == (0, example.answer)
