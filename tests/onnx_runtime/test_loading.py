"""Damaged directories, providers, and what does not go together, are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dop_compile.onnx.contract.manifest import MANIFEST, WEIGHTS
from dop_compile.onnx.run import providers
from dop_compile.onnx.run.pipeline import OnnxPipeline
from dop_compile.onnx.run.sessions import UnrunnableError
from tests.onnx_export.exported import exported, static_export, static_model
from tests.onnx_export.harness import small_family
from tests.onnx_runtime.served import batch, picture, pipeline, served

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(served(), tmp_path / "out"))


def load(folder: Path, **options: Any) -> OnnxPipeline:
    return OnnxPipeline.load(folder, **{"measure": False, "providers": [CPU], **options})


def test_missing_and_truncated_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json in it; expected a directory made by"):
        load(tmp_path)
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: the file is missing"):
        load(folder)
    (tmp_path / "tokenizer.json").rename(folder / "tokenizer.json")
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f"{WEIGHTS}: {len(data) - 1} bytes, the manifest says {len(data)}"):
        load(folder)
    (folder / WEIGHTS).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{WEIGHTS}: its SHA-256 is"):
        load(folder)


def test_a_graph_that_is_none(folder: Path) -> None:
    """Where hashes are not looked at, ONNX Runtime finds it, and the file is named."""
    path = folder / "decode.onnx"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UnrunnableError, match=r"decode\.onnx: "):
        load(folder, hashes=False)


def test_bad_arguments(folder: Path) -> None:
    with pytest.raises(ValueError, match="memory: expected 'fast' or 'shared', got 'small'"):
        load(folder, memory="small")
    with pytest.raises(ValueError, match=r"tiers: expected some of 100%, pruned, given, got \['50%'\]"):
        load(folder, tiers=["50%"])
    with pytest.raises(TypeError, match="providers: expected a list of names"):
        load(folder, providers=CPU)
    with pytest.raises(ValueError, match=r"'CPU' is no provider; available here are .*CPUExecutionProvider"):
        load(folder, providers=["CPU"])


@pytest.mark.parametrize(("name", "value"), [("no_repeat_ngram_size", 3), ("num_beams", 4), ("stop_strings", ["."])])
def test_generation_settings_that_are_not_supported(folder: Path, name: str, value: Any) -> None:
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, name: value}))
    document = json.loads((folder / MANIFEST).read_text())
    for data in document["files"]:
        data["bytes"] = (folder / data["file"]).stat().st_size
    (folder / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(ValueError, match=f"{name} is .*, which this runtime does not support"):
        load(folder, hashes=False)


def test_some_tiers_alone(folder: Path) -> None:
    """A tier that is not loaded needs no graph of its own."""
    found = load(folder, tiers=["pruned"])
    inputs = batch()
    wanted = pipeline().generate(inputs, tier="pruned", max_new_tokens=3)
    assert found.tiers == ("pruned",)
    assert found.generate(inputs, max_new_tokens=3).ids == wanted.ids
    with pytest.raises(ValueError, match="tier '100%': not loaded; expected one of pruned"):
        found.generate(inputs, tier="100%")


@pytest.mark.parametrize("installed", [[CPU], [CUDA, CPU]])
def test_falls_back_with_one_line(
    installed: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Plain onnxruntime, and onnxruntime-gpu without a device."""
    monkeypatch.setattr(providers.ort, "get_available_providers", lambda: installed)
    monkeypatch.setattr(providers, "_starts", lambda path, name: name == CPU)
    path = served() / "embed.onnx"
    assert providers.choose_provider(path, [CUDA, CPU]) == CPU
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(CUDA)
    assert line.endswith(f"using {CPU}")
    with pytest.raises(ValueError, match=f"providers: {CUDA} .*; available here are .*{CPU}"):
        providers.choose_provider(path, [CUDA])


def test_no_line_where_nothing_else_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(providers.ort, "get_available_providers", lambda: [CPU])
    assert providers.choose_provider(served() / "embed.onnx", None) == CPU
    assert capfd.readouterr().err == ""


def test_the_installed_package_prints_no_page(capfd: pytest.CaptureFixture[str]) -> None:
    """As it is here, with or without a GPU: ONNX Runtime's own messages included."""
    found = load(served(), providers=None)
    found.generate(batch(), max_new_tokens=2)
    written = capfd.readouterr()
    assert len([line for line in written.err.splitlines() if "Provider" in line or "onnxruntime" in line]) <= 1
    assert written.out == ""
    started = providers.ort.InferenceSession(str(served() / "embed.onnx"), providers=[found.provider])
    assert found.provider in started.get_providers()


def test_bad_inputs() -> None:
    inputs = batch()
    found = pipeline()
    with pytest.raises(ValueError, match="give a tier or max_ms, not both"):
        found.generate(inputs, tier="100%", max_ms=5)
    with pytest.raises(ValueError, match="max_new_tokens: expected a number >= 1, got 0"):
        found.generate(inputs, max_new_tokens=0)
    with pytest.raises(ValueError, match="padding on the left"):
        found.generate({**inputs, "attention_mask": inputs["attention_mask"].flip(1)})
    with pytest.raises(ValueError, match="attention_mask: expected the shape of input_ids"):
        found.generate({**inputs, "attention_mask": inputs["attention_mask"][:1]})
    with pytest.raises(ValueError, match=r"input_ids: expected integers of shape \(batch, tokens\), got \(7,\)"):
        found.generate({"input_ids": torch.arange(7)})
    with pytest.raises(ValueError, match=r"input_ids: expected .* got none"):
        found.generate({})
    with pytest.raises(ValueError, match="no vision graph was exported"):
        found.generate({**inputs, "pixel_values": inputs["pixel_values"][..., :28]})
    with pytest.raises(ValueError, match="placeholders for 16 features"):
        found.generate({**inputs, "pixel_values": inputs["pixel_values"][:1]})
    with pytest.raises(ValueError, match="expected one entry per prompt, got 1 for 2"):
        found([picture()], ["a", "b"])
    for one in (picture(), "picture.png"):
        with pytest.raises(TypeError, match="image: expected a list with one entry per prompt"):
            found(one, ["a", "b"])
    with pytest.raises(ValueError, match="answers: expected numbers, as a processor returns them"):
        found.generate({**inputs, "answers": [["yes"]]})
    with pytest.raises(TypeError, match="image: expected a PIL image, a file"):
        found(3, "a")


def test_a_file_as_image(tmp_path: Path) -> None:
    picture().save(tmp_path / "picture.png")
    assert pipeline()(tmp_path / "picture.png", "a") == pipeline()(picture(), "a")


def test_static_export() -> None:
    """Its sizes are kept to, or named."""
    model, family = static_model(), small_family("llava", 1)
    example = family.make_inputs(model, [[("text", 3), ("image",), ("text", 3)]])
    found = load(static_export(), measure=True)
    with torch.no_grad():
        expected = model.generate(**example, max_new_tokens=5, do_sample=False)
    ids = expected[0, example["input_ids"].shape[1] :].tolist()
    assert found.generate(example, max_new_tokens=5).ids == [ids]
    assert found.generate(example, max_ms=1e9, max_new_tokens=1).ids == [ids[:1]]
    with pytest.raises(ValueError, match="static and generates at most 5 tokens after this prompt, got 6"):
        found.generate(example, max_new_tokens=6)
    two = family.make_inputs(model, [[("text", 3), ("image",), ("text", 3)]] * 2)
    with pytest.raises(ValueError, match="the graph was exported for shape"):
        found.generate(two, max_new_tokens=2)


@pytest.mark.conformance
def test_bfloat16_is_not_for_the_processor() -> None:
    with pytest.raises(UnrunnableError):
        load(exported("llava", dtype=torch.bfloat16))
