"""The demo: what it asks, prints, draws and writes, and what it refuses.

All but the last test run it on a model of `examples/digits_vlm` with random weights.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.table import Table
from PIL import Image, ImageOps

from digits_vlm import data, models
from digits_vlm.evaluate import answers
from dop_compile import Policy, dop_compile, prefill_flops
from dop_compile.demo import run as demo
from dop_compile.demo.picture import draw
from dop_compile.demo.result import Answered, DemoResult, Question
from tests.command_line import refused, run
from tests.local_llava import picture

PICTURES = {"demo.png", "demo-input.png"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    models.save("llava", models.build("llava"), folder)
    return folder


@pytest.fixture(scope="module")
def opened(checkpoint: Path) -> tuple[Any, Any]:
    return demo.open_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def result(opened: tuple[Any, Any]) -> DemoResult:
    """A demo of two questions."""
    model, reader = opened
    compiled = dop_compile(model, demo.demo_policies(), backend="eager")
    image, questions = demo.compose()
    return demo.run_demo(model, compiled, reader, image, questions[:2], repeats=1)


@pytest.fixture
def finished(result: DemoResult, monkeypatch: pytest.MonkeyPatch) -> DemoResult:
    """What the command line finds, without the work."""
    monkeypatch.setattr("dop_compile.commands.demo.run_demo", lambda *_, **__: result)
    return result


def judged(result: DemoResult) -> DemoResult:
    """Two questions, of which the original answers both rightly, the second tier one, and the others none."""
    questions = (Question("row", "Read row 1.", "7 5"), Question("yesno", "Is there any 8?", "no"))
    said = {"original": ("7 5", "no"), "34%": ("7", "no")}

    def answered(model: Answered) -> Answered:
        return replace(model, answers=said.get(model.name, ("5 7 is a long answer", "yes")))

    tiers = tuple(replace(tier, answered=answered(tier.answered)) for tier in result.tiers)
    return replace(result, questions=questions, original=answered(result.original), tiers=tiers)


def unknown(result: DemoResult) -> DemoResult:
    return replace(result, questions=tuple(replace(question, answer=None) for question in result.questions))


# --- what is asked


def test_canvas_and_questions_are_a_function_of_number_and_seed() -> None:
    def composed(number: int, seed: int) -> tuple[bytes, list[Question]]:
        image, questions = demo.compose(number, seed)
        return image.tobytes(), questions

    drawn = [composed(number, seed) for number in range(3) for seed in range(2)]
    assert drawn == [composed(number, seed) for number in range(3) for seed in range(2)]
    assert len({pixels for pixels, _ in drawn}) == len(drawn)
    for _, questions in drawn:
        assert {question.kind for question in questions} == set(data.KINDS)
        assert len({question.text for question in questions}) == len(questions) == len(demo.QUESTIONS)


def test_a_canvas_is_of_validation_scans() -> None:
    image, questions = demo.compose(2, seed=1)
    canvas = data.canvas("validation", 2, seed=1)
    assert image.tobytes() == canvas.image.tobytes()
    row = next(question for question in questions if question.kind == "row")
    digits = [str(digit) for digit in canvas.digits[int(row.text[-2]) - 1] if digit >= 0]
    assert row.answer == (" ".join(digits) or "none")


def test_of_a_picture_of_ones_own_no_answer_is_known() -> None:
    own = picture()
    image, questions = demo.compose(2, seed=1, image=own)
    assert image.tobytes() == ImageOps.fit(own, (data.CANVAS, data.CANVAS)).tobytes()
    assert [question.text for question in questions] == [question.text for question in demo.compose(2, seed=1)[1]]
    assert {question.answer for question in questions} == {None}


# --- what is found


def test_answers_are_those_of_the_models(opened: tuple[Any, Any], result: DemoResult) -> None:
    model, reader = opened
    asked = [data.Example(result.image, data.prompt(q.text), "", q.kind) for q in result.questions]
    for name, policy in {"original": None, **demo.demo_policies()}.items():
        alone = model if policy is None else dop_compile(model, policy, backend="eager")
        said = [text.strip() or "(empty)" for example in asked for text in answers(alone, reader, [example])]
        assert next(found.answers for found in result.models if found.name == name) == tuple(said), name
    assert len({found.answers for found in result.models}) > 1


def test_costs_are_of_the_first_question_and_name_the_tiers(opened: tuple[Any, Any], result: DemoResult) -> None:
    counts = {"system": result.system, "visual": result.visual, "text": result.text}
    assert counts == {"system": 7, "visual": 144, "text": 11}  # <s> and six words; the question, Answer and a colon
    config = opened[0].config
    whole = prefill_flops(config, Policy.full(demo.LAYERS), **counts)
    for tier in result.tiers:
        share = prefill_flops(config, tier.policy, **counts) / whole
        assert tier.cost.eq11_ratio == share
        assert tier.cost.tier.split()[0] == f"{100 * share:.0f}%"
    for model in result.models:
        assert len(model.milliseconds) == len(demo.BATCHES)
        assert all(time > 0 for time in model.milliseconds)


def test_a_first_tier_that_is_not_the_original_is_noticed(
    opened: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reader = opened
    broken = {demo.FULL: Policy.depthwise(demo.LAYERS, mha_depth=1, mlp_depth=1, visual_tokens=1)}
    compiled = dop_compile(model, broken, backend="eager")
    for exact in (True, False):
        with pytest.raises(RuntimeError, match="logits differ from the original's by"):
            demo.run_demo(model, compiled, reader, *demo.compose(), exact=exact)
    monkeypatch.setattr(demo, "ROUNDING", float("inf"))
    with pytest.raises(RuntimeError, match="does not generate the original's tokens"):
        demo.run_demo(model, compiled, reader, *demo.compose(), exact=False)


def test_everything_that_is_timed_was_warmed(opened: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the warm-up is over, what is built is what compares the logits of all tokens, which is not timed."""
    model, reader = opened
    compiled: Any = dop_compile(model, demo.demo_policies(), backend="eager")
    warm, known = compiled.warmup, []

    def noted(**arguments: Any) -> Any:
        record = warm(**arguments)
        known.extend(compiled.dop.programs)
        return record

    monkeypatch.setattr(compiled, "warmup", noted)
    image, questions = demo.compose()
    found = demo.run_demo(model, compiled, reader, image, questions[:1], repeats=1)
    kinds = {(call.tier, call.batch_size) for call in found.warmed.calls}
    assert kinds == {(tier, batch) for tier in compiled.tiers for batch in demo.BATCHES}
    assert len(known) >= len(compiled.tiers)
    later = [program for program in compiled.dop.programs if program not in known]
    assert all(program.universe.requested_groups is None for program in later)


# --- what is shown


def cells(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


def test_the_tables(result: DemoResult) -> None:
    title, table, _, costs, warmed, last = str(result).split("\n\n")
    assert "8 layers of 128, 2.4 M weights" in title
    head, *rows, right = (cells(line) for line in table.splitlines())
    assert head == ["question", "expected", "original", *demo.demo_policies()]
    assert [row[:2] for row in rows] == [[question.text, question.answer] for question in result.questions]
    assert right[0] == "right answers"
    original, *tiers = (cells(line) for line in costs.splitlines()[1:])
    assert original[:4] == ["original", "628 MFLOPs", "628 MFLOPs", "1.27 MiB"]
    for line, tier in zip(tiers, result.tiers, strict=True):
        ratios = [tier.cost.eq11_ratio or 0, tier.cost.executed_ratio or 0]
        assert line[:3] == [tier.cost.tier, *(f"{100 * ratio:.1f} %" for ratio in ratios)]
    assert re.fullmatch(
        r"Warmed first, in \d+\.\d s: 100%, 34%, 34% split at batch 1 and 8; no graphs compiled\.", warmed
    )
    assert "bit for bit" in last
    assert "bit for bit" not in str(replace(result, exact=False))


def test_right_and_wrong_answers_are_marked(result: DemoResult) -> None:
    table = str(judged(result)).split("\n\n")[1]
    _, first, second, right = (cells(line) for line in table.splitlines())
    long = "5 7 is a long..."
    assert first == ["Read row 1.", "7 5", "7 5 ok", f"{long} wrong", "7 wrong", f"{long} wrong"]
    assert second == ["Is there any 8?", "no", "no ok", "yes wrong", "no ok", "yes wrong"]
    assert right == ["right answers", "2 of 2", "0 of 2", "1 of 2", "0 of 2"]
    text = str(unknown(judged(result)))
    assert not any(word in text for word in (" ok", "wrong", "right answers"))
    assert cells(text.split("\n\n")[1].splitlines()[1])[1] == "?"


def test_the_picture_marks_them_too(result: DemoResult) -> None:
    def drawn(shown: DemoResult) -> list[list[tuple[str, str]]]:
        (table,) = draw(shown).findobj(Table)
        texts = [[table[row, column].get_text() for column in range(2, 6)] for row in (1, 2)]
        return [[(text.get_text(), text.get_color()) for text in line] for line in texts]

    right, wrong = "#1b7837", "#b2182b"
    long = ("5 7 is a long... \N{BALLOT X}", wrong)
    yes = ("yes \N{BALLOT X}", wrong)
    first, second = drawn(judged(result))
    assert first == [("7 5 \N{CHECK MARK}", right), long, ("7 \N{BALLOT X}", wrong), long]
    assert second == [("no \N{CHECK MARK}", right), yes, ("no \N{CHECK MARK}", right), yes]
    assert {colour for line in drawn(unknown(judged(result))) for _, colour in line} == {"#222222"}


def test_every_tiers_operations_are_drawn(result: DemoResult) -> None:
    figure = draw(result)
    maps = [axes for panel in figure.subfigs for axes in panel.axes if axes.texts]
    assert len(maps) == len(result.tiers)
    split = next(axes for axes in maps if axes.get_title().startswith("34% split"))
    numbers = [text.get_text() for text in split.texts if text.get_text().isdigit()]
    # Of visual tokens: all in layer 0, attention in layer 1, keys and values from layer 2 on
    assert numbers == ["144"] * (2 + 3 + 1)


# --- the command


def test_the_command_writes_pictures(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path, finished: DemoResult
) -> None:
    out = tmp_path / "new" / "folder"
    options = ["--checkpoint", str(checkpoint), "--number", "3", "--seed", "2", "--out", str(out)]
    code, text, _ = run(capsys, "demo", *options)
    assert code == 0
    assert text.startswith(str(finished))
    assert str(out / "demo.png") in text
    assert {path.name for path in out.iterdir()} == PICTURES
    composed, _ = demo.compose(3, seed=2)
    with Image.open(out / "demo-input.png") as image, Image.open(out / "demo.png") as drawn:
        assert image.tobytes() == composed.tobytes()
        assert (drawn.format, drawn.size) == ("PNG", (1200, 800))


def test_the_command_on_a_picture_of_ones_own(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "QUESTIONS", ("yesno",))
    monkeypatch.setattr(demo, "BATCHES", (2,))
    own = picture()
    own.save(tmp_path / "own.png")
    options = ["--checkpoint", str(checkpoint), "--out", str(tmp_path), "--repeats", "1"]
    code, text, _ = run(capsys, "demo", *options, "--image", str(tmp_path / "own.png"))
    assert code == 0
    assert "right answers" not in text
    assert "prefill, batch 2" in text
    with Image.open(tmp_path / "demo-input.png") as image:
        assert image.tobytes() == ImageOps.fit(own, (data.CANVAS, data.CANVAS)).tobytes()


@pytest.mark.parametrize("where", ["drawing", "renaming"])
@pytest.mark.usefixtures("finished")
def test_nothing_is_left_of_a_picture_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    (tmp_path / "demo.png").write_bytes(b"an earlier one")
    whole = os.replace

    def full(*arguments: Any, **_: Any) -> None:
        if where == "drawing":
            arguments[1].write(b"half")
        elif Path(arguments[1]).name != "demo.png":
            return whole(*arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*(Figure, "savefig") if where == "drawing" else (os, "replace"), full)
    message = refused(capsys, "demo", "--checkpoint", str(checkpoint), "--out", str(tmp_path))
    assert f"--out '{tmp_path}': cannot write demo.png: No space left on device" in message
    assert {path.name for path in tmp_path.iterdir()} == PICTURES
    assert (tmp_path / "demo.png").read_bytes() == b"an earlier one"


@pytest.mark.usefixtures("finished")
def test_bad_options(capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("nothing")
    file = str(tmp_path / "file")
    named = ["--checkpoint", str(checkpoint)]
    assert "cannot write there: Not a directory" in refused(capsys, "demo", *named, "--out", file)
    assert "not an image" in refused(capsys, "demo", *named, "--out", str(tmp_path), "--image", file)
    assert "No such file" in refused(capsys, "demo", "--out", str(tmp_path), "--image", f"{file}.png")
    assert "--backend 'abacus'" in refused(capsys, "demo", "--out", str(tmp_path), "--backend", "abacus")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    for options in (["--number", "-1"], ["--seed", "x"], ["--repeats", "0"]):
        assert run(capsys, "demo", *options)[0] == 2


def test_wrong_checkpoints(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def answer(directory: Path) -> str:
        return refused(capsys, "demo", "--out", str(out), "--checkpoint", str(directory))

    assert f"{tmp_path / 'none' / 'config.json'} is missing" in answer(tmp_path / "none")
    assert "config.json is missing" in answer(tmp_path)

    models.save("qwen2_5_vl", models.build("qwen2_5_vl"), tmp_path / "qwen")
    assert "for a llava of 8 layers, this is a qwen2_5_vl of 8" in answer(tmp_path / "qwen")

    monkeypatch.setattr(models, "_text", lambda name, text=models._text: {**text(name), "num_hidden_layers": 2})
    models.save("llava", models.build("llava"), tmp_path / "shallow")
    assert "for a llava of 8 layers, this is a llava of 2" in answer(tmp_path / "shallow")
    monkeypatch.undo()

    config = models._llava()
    config.vision_config.patch_size = 16
    monkeypatch.setattr(models, "_llava", lambda: config)
    models.save("llava", models.build("llava"), tmp_path / "coarse")
    assert "for 144 visual tokens, this model has 36" in answer(tmp_path / "coarse")

    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:1000])
    assert "damaged cannot be loaded" in answer(damaged)
    assert not out.exists()


def test_the_demo_needs_a_clone(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(demo, "EXAMPLES", tmp_path)
    assert "run it in a clone" in refused(capsys, "demo", "--out", str(tmp_path))


@pytest.mark.parametrize(
    ("modules", "named"),
    [
        (["sklearn"], "scikit-learn"),
        (["matplotlib"], "matplotlib"),
        (["sklearn", "matplotlib"], "scikit-learn and matplotlib"),
    ],
)
def test_missing_packages_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modules: list[str], named: str
) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    code, out, err = run(capsys, "demo", "--out", str(tmp_path))
    assert (code, out) == (1, "")
    assert err.splitlines() == [
        f"dop-compile demo: ModuleNotFoundError: the demo needs {named}: pip install 'dop_compile[demo]'"
    ]
    assert not list(tmp_path.iterdir())


def test_the_shipped_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run(capsys, "demo", "--out", str(tmp_path), "--repeats", "1")
    assert code == 0, err
    assert {path.name for path in tmp_path.iterdir()} == PICTURES
    _, original, full, *_ = cells(next(line for line in out.splitlines() if line.startswith("right answers")))
    # A model that guesses is right in about one of these six
    assert original == full
    assert int(original.split()[0]) >= 3
