"""Packed questions are the model's own forward on each question alone; dropped image tokens are a reducer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from digits_vlm import data, models
from digits_vlm.packing import Batch, decode_batch, make_batch
from digits_vlm.train import image_features
from dop_compile import Policy, dop_compile
from tests.support import assert_close


def batch_for(name: str, start: int, canvases: int = 2) -> Batch:
    words, images = models.tokenizer(name), models.image_processor(name)
    return make_batch(name, range(start, start + canvases), questions=6, words=words, images=images)


def first_batch(name: str, *, dropped: bool, compact: bool) -> tuple[int, Batch]:
    """Number of its first canvas, and the first batch with image tokens dropped or not, and numbered in that way."""
    for start in range(0, 80, 2):
        batch = batch_for(name, start)
        if (batch.kept is not None) == dropped and (not dropped or batch.compact == compact):
            return start, batch
    raise AssertionError("no such batch among the first 40")


@pytest.fixture(scope="module", params=models.NAMES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, models.Reader]:
    """A model with random weights, through its own files."""
    directory = tmp_path_factory.mktemp(request.param)
    models.save(request.param, models.build(request.param), directory)
    return (request.param, *models.load(directory))


@torch.no_grad()
@pytest.mark.parametrize("compact", [None, False, True])
def test_targets_have_the_logits_of_a_question_alone(trained: Any, compact: bool | None) -> None:
    name, model, reader = trained
    if name == "qwen2_5_vl" and compact:
        pytest.skip("positions of several axes are not numbered anew")
    start, batch = first_batch(name, dropped=compact is not None, compact=bool(compact))
    logits = decode_batch(model, batch, image_features(model, batch.pixels)[0])
    alone = model
    if batch.kept is not None:
        count, positions = batch.kept.shape[1], "compact" if compact else "original"
        policy = Policy.full(8).replace(visual_tokens=count, reducer="given", positions=positions)
        alone = dop_compile(model, policy, backend="eager")
    side = data.CANVAS if name == "llava" else int(batch.pixels["image_grid_thw"][0, 1]) * 6
    for number in range(0, len(batch.targets), 5):
        row, column, _ = batch.targets[number].tolist()
        inside = (batch.block[row] == batch.block[row, column]) & (torch.arange(batch.block.shape[1]) <= column)
        words = reader.tokenizer.decode(batch.questions[row][inside])
        image = data.canvas("train", start + row).image.resize((side, side))
        inputs = reader([image], [f"{data.SYSTEM} <image> {words}"])
        given = {} if batch.kept is None else {"visual_indices": [batch.kept[row].tolist()]}
        assert_close(logits[number], alone(**inputs, **given).logits[0, -1])


def test_targets_are_the_answers_up_to_their_end() -> None:
    batch = batch_for("llava", 0)
    words = models.tokenizer("llava")
    colon = words.convert_tokens_to_ids(":")
    targets = {(row, column): target for row, column, target in batch.targets.tolist()}
    for row in range(len(batch.questions)):
        for number in range(1, int(batch.block[row].max()) + 1):
            columns = (batch.block[row] == number).nonzero().flatten().tolist()
            ids = batch.questions[row][columns].tolist()
            asked = ids.index(colon)
            answer = [targets.pop((row, column)) for column in columns[asked:]]
            assert answer == [*ids[asked + 1 :], models.EOS]
    assert targets  # the hints
    hints = {words.decode([batch.questions[row, column]]) for row, column in targets}
    assert hints <= {*map(str, range(10)), "?"}


@pytest.mark.parametrize("name", models.NAMES)
def test_patch_labels_cover_every_digit(name: str) -> None:
    batch = batch_for(name, 4, canvases=6)
    for row in range(6):
        canvas = data.canvas("train", 4 + row)
        digits, centres = batch.patches[row].unbind(-1)
        assert int(centres.sum()) == (canvas.digits >= 0).sum()
        assert sorted(digits[centres == 1].tolist()) == sorted(canvas.digits[canvas.digits >= 0].tolist())
        assert set(digits.tolist()) <= {*canvas.digits[canvas.digits >= 0].tolist(), 10}
        assert batch.present[row].nonzero().flatten().tolist() == sorted({*canvas.digits.flat} - {-1})


def test_a_batch_depends_on_its_arguments_alone() -> None:
    once, again, other = batch_for("llava", 0), batch_for("llava", 0), batch_for("llava", 2)
    assert torch.equal(once.questions, again.questions)
    assert torch.equal(once.targets, again.targets)
    assert not torch.equal(once.patches, other.patches)


def test_saved_files(tmp_path: Path) -> None:
    """What a user with torchvision needs is there also where this machine cannot read it."""
    models.save("qwen2_5_vl", models.build("qwen2_5_vl"), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"}
    assert names >= {"video_preprocessor_config.json", "chat_template.jinja", "generation_config.json"}
