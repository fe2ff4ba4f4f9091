"""Tiers that were saved with a model are those of every command, unless others are given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from dop_compile import Policy, dop_compile
from dop_compile.commands import bench, policies
from dop_compile.commands import evaluate as evaluation
from dop_compile.commands import export as onnx
from dop_compile.commands.usage import UsageError
from tests.command_line import refused, run
from tests.local_llava import local_llava, local_processor, picture

LAYERS, SIZE = 4, 56
TIERS = {"full": Policy.full(LAYERS), "half": Policy.depthwise(LAYERS, mha_depth=2, visual_tokens=5)}
COUNTS = ("--system", "3", "--visual", "16", "--text", "4")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled model with its tiers and processor, a picture and samples."""
    folder = tmp_path_factory.mktemp("saved")
    model = local_llava(layers=LAYERS, hidden=32, image_size=SIZE)
    dop_compile(model, TIERS, backend="eager").save_pretrained(folder)
    local_processor(SIZE).save_pretrained(folder)
    picture().save(folder / "0.png")
    line = {"image": "0.png", "prompt": "What is on the table ?", "answers": ["this"]}
    (folder / "samples.jsonl").write_text(json.dumps(line) + "\n")
    return folder


def test_explain(capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path) -> None:
    for where in (saved, saved / "config.json"):
        _, out, err = run(capsys, "explain", str(where), *COUNTS, "--json")
        found = json.loads(out)
        assert (found["tier"], [tier["tier"] for tier in found["tiers"]]) == ("full", list(TIERS))
        assert "replace" not in err
    _, out, _ = run(capsys, "explain", str(saved), *COUNTS, "--tier", "half", "--save-policy", str(tmp_path / "p.json"))
    assert "tier 'half'" in out
    assert Policy.load(tmp_path / "p.json") == TIERS["half"]


def test_policies_that_are_given_replace_them_and_that_is_said(
    capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path
) -> None:
    TIERS["half"].save(tmp_path / "mine.json")
    for own in (["--policy", str(tmp_path / "mine.json")], ["--mha-depth", "2"]):
        code, out, err = run(capsys, "explain", str(saved), *COUNTS, *own, "--json")
        assert (code, len(json.loads(out)["tiers"])) == (0, 1)
        assert f"the policies given replace the tiers saved with {saved} (full, half)" in err
        assert "is not one of the policies given" in refused(capsys, "explain", str(saved), *own, "--tier", "half")


def test_run(capsys: pytest.CaptureFixture[str], saved: Path) -> None:
    ask = ["run", str(saved), "--image", str(saved / "0.png"), "--prompt", "What is this ?", "--max-new-tokens", "3"]
    code, out, _ = run(capsys, *ask, "--compare")
    answer, original, _ = out.strip().splitlines()
    assert (code, original) == (0, f"original: {answer}")
    given = run(capsys, *ask, "--mha-depth", "2", "--visual-tokens", "5")[1]
    assert run(capsys, *ask, "--tier", "half")[1] == given
    message = refused(capsys, *ask, "--tier", "quarter")
    assert f"'quarter' is not one of the tiers saved with {saved} (full, half)" in message


def test_bench_and_eval(capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path) -> None:
    """A tier of a name that the commands give to something else is measured under another."""
    argv = ["bench", str(saved), "--rounds", "1", "--new-tokens", "1", "--out", str(tmp_path)]
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert [f"| {name} |" in out for name in ("full (saved)", "half")] == [True, True]
    argv = ["eval", str(saved), "--samples", str(saved / "samples.jsonl"), "--max-new-tokens", "1"]
    code, out, _ = run(capsys, *argv, "--out", str(tmp_path))
    assert code == 0
    assert [f"| {name} |" in out for name in ("full (saved)", "half")] == [True, True]


def test_export(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, saved: Path, tmp_path: Path
) -> None:
    """What is exported are the tiers, the one that is named first."""
    exported: list[dict[str, Policy]] = []

    def stop(model: Any, tiers: dict[str, Policy], *args: Any, **kwargs: Any) -> None:
        exported.append(tiers)
        raise ValueError("enough")

    monkeypatch.setattr("dop_compile.onnx.export.export.export_onnx", stop)
    argv = ["export", str(saved), "--out", str(tmp_path / "out")]
    assert "enough" in refused(capsys, *argv)
    refused(capsys, *argv, "--tier", "half")
    assert [list(tiers) for tiers in exported] == [["full", "half"], ["half", "full"]]
    assert exported[0] == exported[1] == TIERS


def test_a_damaged_file_of_tiers_is_refused(capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    (tmp_path / "dop_compile.json").write_text('{"format": "x"}')
    assert "dop_compile.json: format" in refused(capsys, "explain", str(tmp_path), *COUNTS)
    assert run(capsys, "explain", str(tmp_path), *COUNTS, "--mha-depth", "2")[0] == 0


@pytest.mark.parametrize(("cause", "said"), [(EntryNotFoundError, False), (LocalEntryNotFoundError, True)])
def test_a_hub_that_cannot_be_asked_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cause: Any, said: bool
) -> None:
    def fail(name: str) -> None:
        raise OSError("no such file") from cause.__new__(cause)

    monkeypatch.setattr(policies, "load_policies", fail)
    assert policies.saved_policies("owner/name") == {}
    assert ("it is not known whether owner/name has tiers" in capsys.readouterr().err) is said
    monkeypatch.setattr(policies, "load_policies", lambda name: TIERS)
    assert policies.saved_policies("owner/name") == TIERS


def test_every_command_with_policies_reads_them() -> None:
    for module in (bench, onnx):
        assert vars(module)["read_policies"] is policies.read_policies
    assert vars(evaluation)["replacing"] is policies.replacing
    with pytest.raises(UsageError, match="no such directory"):
        policies.saved_policies("./none")
