"""The manifest is read strictly, and the files that it names are looked at."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dop_compile.onnx.contract.manifest import MANIFEST, WEIGHTS, Manifest
from tests.onnx_export.exported import exported


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of an export, to damage."""
    return Path(shutil.copytree(exported("llava"), tmp_path / "out"))


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / MANIFEST).read_text())
    edit(document)
    (folder / MANIFEST).write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(format="x"), "not the manifest of an export"),
        (lambda d: d.update(version=2), "reads version 1, got 2"),
        (lambda d: d.update(version=True), "reads version 1"),
        (lambda d: d.pop("opset"), "opset: the field is missing"),
        (lambda d: d.update(opsets=23), "opsets: unknown field; did you mean 'opset'"),
        (lambda d: d["tiers"].clear(), "tiers: expected at least one"),
        (lambda d: d["tiers"]["pruned"].update(prefill="x"), "tiers.pruned.prefill: there is no graph 'x'"),
        (lambda d: d["graphs"]["decode"]["inputs"][0].update(shape="x"), r"decode.inputs\[0\].shape: expected a list"),
        (lambda d: d["past_classes"].pop(), "each of 2 layers once"),
        (lambda d: d["weights"].update(file="../w"), "expected a file inside the directory"),
        (lambda d: d.update(positions="modell"), "positions: expected one of sequential, model, got 'modell'"),
        (lambda d: d["graphs"]["decode"]["outputs"][0].update(dtype="float"), "logits: unknown dtype 'float'"),
        (lambda d: d["graphs"]["embed"]["inputs"][0]["min"].pop(), "embed: input_ids: shape, min, opt and max differ"),
        (
            lambda d: d["past_classes"][1]["tiers"].pop("pruned"),
            r"past_classes\[1\]: expected sections of tier 'pruned'",
        ),
        (lambda d: d["tiers"]["pruned"]["sections"].pop(), r"past_classes\[0\]: expected sections of tier 'pruned'"),
        (lambda d: d["tiers"]["pruned"]["policy"].update(num_layers=3), "the policy is for 3 layers"),
    ],
)
def test_corrupted(folder: Path, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    change(folder, edit)
    with pytest.raises(ValueError, match=message) as caught:
        Manifest.load(folder)
    assert str(folder / MANIFEST) in str(caught.value)


def test_fields_of_a_newer_minor_version_are_named_and_kept(folder: Path) -> None:
    change(folder, lambda document: document.update(version="1.2", later={"a": 1}))
    with pytest.warns(UserWarning, match=r"version 1\.2: later: not known"):
        found = Manifest.load(folder)
    assert json.loads(found.to_json()) == json.loads((folder / MANIFEST).read_text())
    assert found.version == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", '{"format": NaN}'])
def test_not_json(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        Manifest.load(folder)


def test_not_text(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="UTF-8"):
        Manifest.load(folder)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json in it; expected a directory made by"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("name", [WEIGHTS, "decode.onnx", "config.json"])
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}: the file is missing; the export is incomplete"):
        Manifest.load(folder)


def test_truncated_weights(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f"{WEIGHTS}: {len(data) - 1} bytes, the manifest says {len(data)}"):
        Manifest.load(folder)


def test_changed_weights(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    Manifest.load(folder)
    with pytest.raises(ValueError, match=f"{WEIGHTS}: its SHA-256 is"):
        Manifest.load(folder, hashes=True)
