"""``dop-compile export`` and ``verify``, as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dop_compile import Policy
from dop_compile.onnx.contract.manifest import WEIGHTS, Manifest
from tests.command_line import refused, run
from tests.local_llava import local_llava, local_processor, picture

LAYERS = 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, samples and policies."""
    folder = tmp_path_factory.mktemp("onnx")
    local_llava(layers=LAYERS, hidden=64, image_size=56).save_pretrained(folder / "model")
    local_processor(56).save_pretrained(folder / "model")
    picture().save(folder / "0.png")
    line = {"image": "0.png", "prompt": "What is on the table ?"}
    (folder / "samples.jsonl").write_text(json.dumps(line) + "\n")
    Policy.full(LAYERS).save(folder / "full.json")
    Policy.depthwise(LAYERS, mlp_depth=0, visual_tokens=7).save(folder / "half.json")
    return folder


@pytest.fixture(scope="module")
def out(folder: Path) -> Path:
    from dop_compile.cli import main

    argv = ["export", str(folder / "model"), "--static", "--text", "2,24,24", "--layout", "triton"]
    argv += ["--policy", f"100%={folder / 'full.json'}", "--policy", f"50%={folder / 'half.json'}"]
    assert main([*argv, "--out", str(folder / "out")]) == 0
    return folder / "out"


def test_export_then_verify(capsys: pytest.CaptureFixture[str], folder: Path, out: Path) -> None:
    assert list(Manifest.load(out, hashes=True).tiers) == ["100%", "50%"]
    argv = ["verify", str(out), "--samples", str(folder / "samples.jsonl"), "--max-new-tokens", "3"]
    code, text, _ = run(capsys, *argv)
    assert code == 0
    assert "all tiers agree with PyTorch" in text
    kept = Manifest.load(out).verification
    assert kept is not None
    assert kept.passed
    code, text, _ = run(capsys, *argv, "--tolerance", "0")
    assert code == 1
    assert "FAILED" in text


def test_repository_of_the_export(out: Path) -> None:
    """It appears with the directory, and shares its files."""
    graphs = Manifest.load(out).graphs
    assert {path.name for path in (out / "triton").iterdir()} == set(graphs)
    for name, graph in graphs.items():
        assert (out / "triton" / name / "1" / "model.onnx").samefile(out / graph.data.file)


def test_refused_layout(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    line = refused(capsys, "export", str(folder / "model"), "--out", str(tmp_path / "o"), "--layout", "genai")
    assert "ONNX Runtime GenAI" in line
    assert not (tmp_path / "o").exists()


def test_trtexec(capsys: pytest.CaptureFixture[str], out: Path, tmp_path: Path) -> None:
    code, text, _ = run(capsys, "trtexec", str(out))
    assert code == 0
    assert len(text.splitlines()) == len(Manifest.load(out).graphs)
    assert all(line.startswith("trtexec --onnx=") for line in text.splitlines())
    assert "no manifest.json" in refused(capsys, "trtexec", str(tmp_path))


def test_existing_directory(capsys: pytest.CaptureFixture[str], folder: Path, out: Path) -> None:
    before = (out / WEIGHTS).stat().st_mtime_ns
    assert "--force" in refused(capsys, "export", str(folder / "model"), "--out", str(out))
    assert (out / WEIGHTS).stat().st_mtime_ns == before


def test_wrong_provider_and_damage(capsys: pytest.CaptureFixture[str], folder: Path, out: Path, tmp_path: Path) -> None:
    argv = ["verify", str(out), "--samples", str(folder / "samples.jsonl")]
    assert "is no provider" in refused(capsys, *argv, "--provider", "NoProvider")
    assert "no manifest.json" in refused(capsys, "verify", str(tmp_path), "--samples", str(folder / "samples.jsonl"))


@pytest.mark.parametrize(
    "option", [("--text", "1,2"), ("--image-size", "x"), ("--opset", "20"), ("--visual-length", "0")]
)
def test_wrong_options(
    capsys: pytest.CaptureFixture[str], folder: Path, option: tuple[str, str], tmp_path: Path
) -> None:
    code, _, err = run(capsys, "export", str(folder / "model"), "--out", str(tmp_path / "o"), *option)
    assert code == 2
    assert option[0] in err


MISSING = """
import sys
from importlib.machinery import PathFinder

class Hidden:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("onnx", "onnxscript", "onnxruntime"):
            raise ModuleNotFoundError(name)

import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in ("onnx", "onnxscript", "onnxruntime") else found(name, *a)
sys.meta_path.insert(0, Hidden)
import dop_compile
assert not {"onnx", "onnxscript", "onnxruntime"} & set(sys.modules)
try:
    dop_compile.export_onnx
except ModuleNotFoundError as error:
    print(error)
"""


def test_without_the_packages() -> None:
    """The library works without them, and the export says what to install."""
    done = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True)
    assert done.stdout.strip() == "onnx, onnxscript, onnxruntime: not installed; pip install dop_compile[onnx]", (
        done.stderr
    )
