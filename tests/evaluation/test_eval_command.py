"""`dop-compile eval` in-process, on a tiny LLaVA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dop_compile import Policy
from dop_compile.evaluation import Evaluation
from dop_compile.search import Divergences
from tests.command_line import refused, run
from tests.local_llava import local_llava, local_processor, picture

LAYERS = 4
WORDS = ("table", "picture", "colour", "human")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, samples of two tasks, and divergences of two of them."""
    from dop_compile.cli import main

    folder = tmp_path_factory.mktemp("eval")
    local_llava(layers=LAYERS, hidden=64, image_size=56).save_pretrained(folder / "model")
    local_processor(56).save_pretrained(folder / "model")
    lines = []
    for number, word in enumerate(WORDS):
        picture().rotate(90 * number).save(folder / f"{number}.png")
        line = {"image": f"{number}.png", "prompt": f"What is the {word} ?", "answers": [word]}
        lines.append({**line, "task": ("odd", "even")[number % 2]})
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["profile", str(folder / "model"), "--samples", str(folder / "samples.jsonl"), "--count", "2"]
    assert main([*argv, "--out", str(folder / "d.json")]) == 0
    return folder


def command(folder: Path, out: Path, *more: str) -> list[str]:
    samples = ["--samples", str(folder / "samples.jsonl"), "--max-new-tokens", "2"]
    return ["eval", str(folder / "model"), *samples, "--out", str(out), *more]


def test_methods_at_budgets_and_files(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    Policy.depthwise(LAYERS, mlp_depth=1).save(tmp_path / "mine.json")
    methods = [
        "--method",
        "random",
        "--method",
        "split",
        "--method",
        "dop+random",
        "--budget",
        "0.95",
        "--budget",
        "0.9",
    ]
    files = ["--policy", str(tmp_path / "mine.json"), "--divergences", str(folder / "d.json")]
    out = tmp_path / "out"
    code, text, _ = run(capsys, *command(folder, out, *methods, *files))
    assert code == 0
    result = Evaluation.load(out / "evaluation.json")
    made = [f"{name} {budget}" for name in ("random", "split", "dop+random") for budget in ("95%", "90%")]
    assert result.labels == ("original", *made, "mine")
    assert result.tasks == ("odd", "even", "odd", "even")
    for row in result.rows()[1:-1]:
        assert row.budget is not None
        assert 0.5 < row.flops <= row.budget
    assert (out / "evaluation.md").read_text().strip() in text
    assert (out / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in out.iterdir()} >= {"evaluation.json", "evaluation.md", "evaluation.png"}
    before = (out / "evaluation.json").read_bytes()
    assert run(capsys, *command(folder, out, *methods, *files))[0] == 0
    assert (out / "evaluation.json").read_bytes() == before, "what is finished is not measured again"
    code, text, _ = run(capsys, *command(folder, out, *methods, *files, "--method", "full"))
    assert code == 0
    after = Evaluation.load(out / "evaluation.json")
    assert (after.labels, after.methods[:-1]) == ((*result.labels, "full"), result.methods)
    assert "their times at another moment: full." in text


def test_bad_input(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def said(*more: str) -> str:
        return refused(capsys, *command(folder, out, *more))

    assert "nothing to compare" in said()
    assert "give --budget" in said("--method", "random")
    assert "no method takes one" in said("--method", "original", "--budget", "0.5")
    assert "No such file" in said("--policy", "none.json")
    assert "No such file" in said("--method", "dop", "--budget", "0.5", "--divergences", "none.json")
    (tmp_path / "other.json").write_text("{}")
    assert "not a file of divergences" in said(
        "--method", "dop", "--budget", "1", "--divergences", f"{tmp_path}/other.json"
    )
    assert "not the file of an operation order" in said("--budget", "0.5", "--order", f"{tmp_path}/other.json")
    twice = ["--policy", f"{tmp_path}/a.json", "--policy", f"a={tmp_path}/a.json"]
    Policy.full(LAYERS).save(tmp_path / "a.json")
    assert "given twice" in said(*twice)
    assert "not a backend" in said("--method", "full", "--backend", "best")
    assert "did you mean 'random'?" in said("--method", "randon", "--budget", "0.5")
    assert "did you mean 'random'?" in said("--method", "dop+randon", "--budget", "0.5")
    assert "give --divergences FILE" in said("--method", "split", "--budget", "0.9")
    assert "--budget 1.5: expected a fraction" in said("--method", "random", "--budget", "1.5")
    assert not out.exists()  # all of this is said before a model is loaded
    (tmp_path / "file").write_text("in the way")
    nowhere = command(folder, tmp_path / "file" / "out", "--method", "full")
    assert "cannot write there: Not a directory" in refused(capsys, *nowhere)
    assert "makes pictures of one size" in said("--method", "resize", "--budget", "0.5")
    assert "no number of visual tokens meets the budget" in said("--method", "uniform", "--budget", "0.01")
    other = Divergences.load(folder / "d.json").to_json().replace('"model_fingerprint": "', '"model_fingerprint": "0')
    (tmp_path / "foreign.json").write_text(other)
    foreign = ["--method", "split", "--budget", "0.9", "--divergences", str(tmp_path / "foreign.json")]
    assert "divergences: made for another model" in said(*foreign)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"answers": []}, "line 2: it has no answers"), ({"task": ""}, "sample 1 has no task, and others have one")],
)
def test_samples_without_answers_or_task(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()[:2]]
    lines[1] |= change
    own = [{**line, "image": str(folder / line["image"])} for line in lines]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(line) + "\n" for line in own))
    argv = ["eval", str(folder / "model"), "--samples", str(tmp_path / "s.jsonl"), "--method", "full"]
    assert message in refused(capsys, *argv, "--out", str(tmp_path / "out"))
