"""Samples: lines and data sets to rows, rows to a model's inputs; what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dop_compile.hf.prompts import prompt_inputs
from dop_compile.search.samples import Row, Samples, check_images, choose, read_data_set, read_jsonl
from tests.local_llava import local_processor


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (60, 40), (40 * number, 20, 90)).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path


def write(folder: Path, *documents: object) -> Path:
    path = folder / "samples.jsonl"
    path.write_text("\n".join(d if isinstance(d, str) else json.dumps(d) for d in documents) + "\n")
    return path


def test_lines_become_rows_with_paths_relative_to_the_file(photos: Path) -> None:
    path = write(
        photos,
        {"image": "photos/0.png", "prompt": "What?", "answers": ["a", "b"]},
        "",
        {"image": ["photos/1.png", "photos/2.png"], "prompt": "Which?", "answers": "c"},
        {"image": "photos/2.png", "prompt": "And?", "task": "more"},
    )
    rows = read_jsonl(path)
    assert [row.images for row in rows] == [
        (str(photos / "photos/0.png"),),
        (str(photos / "photos/1.png"), str(photos / "photos/2.png")),
        (str(photos / "photos/2.png"),),
    ]
    assert [row.answers for row in rows] == [("a", "b"), ("c",), ()]
    assert [row.task for row in rows] == ["", "", "more"]
    assert rows[2].name == f"{path}, line 4"


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\x1c", "\x0b", "\r\n"])
def test_only_line_feeds_end_a_line(photos: Path, mark: str) -> None:
    prompt = f"Read row 1.{mark.strip(chr(13) + chr(10))}Thanks"
    lines = [json.dumps({"image": "photos/0.png", "prompt": prompt}, ensure_ascii=False) for _ in range(2)]
    path = photos / "samples.jsonl"
    if mark in ("\x1c", "\x0b"):  # JSON has them escaped
        lines = [json.dumps({"image": "photos/0.png", "prompt": prompt}) for _ in range(2)]
    path.write_text(("\r\n" if mark == "\r\n" else "\n").join(lines), encoding="utf-8")
    assert [row.prompt for row in read_jsonl(path)] == [prompt] * 2


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "line 1: not JSON"),
        ([1], "expected an object"),
        ({"prompt": "x"}, "image: expected a path.*samples without images"),
        ({"image": [], "prompt": "x"}, "samples without images"),
        ({"image": "a.png"}, "prompt: expected a string"),
        ({"image": "a.png", "prompt": "x", "answer": "y"}, "unknown field answer"),
        ({"image": "a.png", "prompt": "x", "answers": [1]}, "answers: expected"),
        ({"image": "a.png", "prompt": "x", "task": 3}, "task: expected a string"),
    ],
    ids=str,
)
def test_wrong_lines_are_named(tmp_path: Path, document: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_jsonl(write(tmp_path, document))


def test_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no samples in it"):
        read_jsonl(write(tmp_path, ""))


def test_images_that_do_not_decode_are_named_or_left_out(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (photos / "photos/1.png").read_bytes()
    (photos / "photos/cut.png").write_bytes(whole[: len(whole) // 2])
    names = ["photos/0.png", "photos/cut.png", "photos/none.png", "photos/2.png"]
    rows = read_jsonl(write(photos, *({"image": name, "prompt": "x"} for name in names)))
    with pytest.raises(ValueError, match=r"line 2: .*cut\.png cannot be decoded.*none\.png.*--skip-bad"):
        check_images(rows)
    assert check_images(rows, skip_bad=True) == [rows[0], rows[3]]
    said = capsys.readouterr().err
    assert "cut.png" in said
    assert "none.png" in said
    with pytest.raises(ValueError, match="no sample is left"):
        check_images(rows[1:3], skip_bad=True)


def test_samples_are_the_processors_inputs(photos: Path) -> None:
    processor = local_processor(56)
    rows = read_jsonl(
        write(photos, *({"image": f"photos/{n}.png", "prompt": f"What is {n}?", "answers": "x"} for n in range(3)))
    )
    samples = Samples(rows, processor, dtype=torch.float64)
    assert len(samples) == 3
    expected = prompt_inputs(processor, "What is 2?", [Image.open(photos / "photos/2.png").convert("RGB")])
    assert torch.equal(samples[2]["input_ids"], expected["input_ids"])
    assert torch.equal(samples[2]["pixel_values"], expected["pixel_values"].double())
    assert samples[2]["answers"] == ["x"]
    assert [s["input_ids"].tolist() for s in samples[1:]] == [samples[n]["input_ids"].tolist() for n in (1, 2)]
    (photos / "photos/1.png").unlink()
    with pytest.raises(ValueError, match=r"line 2: .*1\.png cannot be decoded"):
        samples[1]


def test_too_many_image_tokens(photos: Path) -> None:
    rows = read_jsonl(write(photos, {"image": "photos/0.png", "prompt": "<image> and <image>"}))
    with pytest.raises(ValueError, match=r"line 1: the prompt holds 2 <image> for 1 images"):
        Samples(rows, local_processor(56))[0]


def test_a_draw_is_a_function_of_its_seed() -> None:
    rows = [Row(str(number), (), "") for number in range(50)]
    drawn = choose(rows, 10, seed=3)
    assert drawn == choose(rows, 10, seed=3) != choose(rows, 10, seed=4)
    assert [int(row.name) for row in drawn] == sorted({int(row.name) for row in drawn})
    assert choose(rows, None, 0) == choose(rows, 99, 0) == rows


def test_a_local_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pictures = [Image.fromarray(np.full((8, 8, 3), 30 * n, dtype=np.uint8)) for n in range(3)]
    table = datasets.Dataset.from_dict(
        {"image": pictures, "question": ["a?", "b?", "c?"], "right": [["x"], ["y", "z"], ["x"]]},
        features=datasets.Features(
            image=datasets.Image(), question=datasets.Value("string"), right=datasets.List(datasets.Value("string"))
        ),
    )
    table.to_parquet(str(tmp_path / "train.parquet"))
    rows = read_data_set(str(tmp_path), answers="right")
    assert [(row.prompt, row.answers) for row in rows] == [("a?", ("x",)), ("b?", ("y", "z")), ("c?", ("x",))]
    for row, picture in zip(rows, pictures, strict=True):
        assert np.array_equal(np.asarray(row.open()[0]), np.asarray(picture))
    assert [row.task for row in read_data_set(str(tmp_path), task="question")] == ["a?", "b?", "c?"]
    with pytest.raises(ValueError, match=r"no column 'answer'; it has image, question, right"):
        read_data_set(str(tmp_path), answers="answer")
    with pytest.raises(ValueError, match="split 'test'"):
        read_data_set(str(tmp_path), split="test")
