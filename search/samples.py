"""Samples to measure on: a JSON Lines file, or a Hugging Face data set.

A line of the file is an object with `image` (a path, or a list of paths, relative to the file), `prompt`, and
optionally `answers` (a string or a list) and `task` (a name, by which accuracies are told apart):

    {"image": "photos/7.png", "prompt": "Which digit is in row 1 column 2?", "answers": ["7"], "task": "read"}
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image
from tqdm import tqdm

from dop_compile.hf.images import load_image
from dop_compile.hf.prompts import prompt_inputs
from dop_compile.reducers import resize_processor

__all__ = ["Row", "Samples", "read_data_set", "read_jsonl"]


@dataclass(frozen=True)
class Row:
    """One question about one or more images; `name` is how messages call it.

    An image is a path, or a function that gives it.
    """

    name: str
    images: tuple[str | Callable[[], Image.Image], ...]
    prompt: str
    answers: tuple[str, ...] = ()
    task: str = ""

    def open(self) -> list[Image.Image]:
        """The images, upright and in RGB.

        Raises:
            ValueError: one does not decode; the message names row and image.
        """
        found = []
        for number, image in enumerate(self.images):
            try:
                found.append(load_image(image if isinstance(image, str) else image()))
            except Exception as error:  # damaged files raise whatever their decoder meets
                label = image if isinstance(image, str) else f"image {number}"
                raise ValueError(f"{self.name}: {label} cannot be decoded ({_one_line(error)})") from error
        return found


class Samples(Sequence[dict[str, Any]]):
    """A model's inputs and the right `answers`, row by row, made when they are asked for.

    Args:
        rows: the questions.
        processor: the model's processor.
        device, dtype: of the tensors.
    """

    def __init__(self, rows: Sequence[Row], processor: Any, *, device: Any = "cpu", dtype: Any = None):
        self.rows = tuple(rows)
        self._processor, self._device, self._dtype = processor, device, dtype

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, number: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, number: slice) -> Samples: ...

    def __getitem__(self, number: int | slice) -> dict[str, Any] | Samples:
        if isinstance(number, slice):
            return Samples(self.rows[number], self._processor, device=self._device, dtype=self._dtype)
        row = self.rows[number]
        try:
            inputs = prompt_inputs(self._processor, row.prompt, row.open())
        except ValueError as error:
            raise ValueError(f"{row.name}: {error}") from error
        moved = inputs.to(self._device) if self._dtype is None else inputs.to(self._device, self._dtype)
        return {**moved, "answers": list(row.answers)}

    def resized(self, number: int, visual_tokens: int) -> dict[str, Any]:
        """A sample whose pictures are made smaller by the processor: at most `visual_tokens` of all of them together.

        Raises:
            TypeError: the model's pictures are all of one size.
            ValueError: fewer tokens than pictures.
        """
        images = len(self.rows[number].images)
        if visual_tokens < images:
            raise ValueError(f"{self.rows[number].name}: {visual_tokens} visual tokens for {images} images")
        processor = resize_processor(self._processor, visual_tokens // images)
        return Samples(self.rows, processor, device=self._device, dtype=self._dtype)[number]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[number] for number in range(len(self)))


def read_jsonl(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a JSON Lines file; images are not opened yet.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not such an object; the message names file and line.
    """
    path = Path(path)
    rows = []
    # Not splitlines(): U+2028, U+2029 and U+0085 may stand inside a JSON string
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                rows.append(_row(json.loads(line), where, path.parent))
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON: {error}") from error
    if not rows:
        raise ValueError(f"{path}: no samples in it; expected one JSON object per line")
    return rows


def _row(document: Any, where: str, folder: Path) -> Row:
    if not isinstance(document, dict):
        raise ValueError(f"{where}: expected an object with image and prompt, got {type(document).__name__}")
    if unknown := sorted(set(document) - {"image", "prompt", "answers", "task"}):
        raise ValueError(f"{where}: unknown field {', '.join(unknown)}; expected image, prompt, answers and task")
    images, answers = document.get("image"), document.get("answers", [])
    images = [images] if isinstance(images, str) else images
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(images, list) or not images or not all(isinstance(image, str) for image in images):
        raise ValueError(f"{where}: image: expected a path or a list of paths; samples without images cannot be used")
    if not isinstance(document.get("prompt"), str):
        raise ValueError(f"{where}: prompt: expected a string")
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{where}: answers: expected a string or a list of strings")
    if not isinstance(task := document.get("task", ""), str):
        raise ValueError(f"{where}: task: expected a string")
    return Row(where, tuple(str(folder / image) for image in images), document["prompt"], tuple(answers), task)


def read_data_set(
    name: str,
    *,
    split: str = "train",
    image: str = "image",
    prompt: str = "question",
    answers: str | None = None,
    task: str | None = None,
) -> list[Row]:
    """The rows of a Hugging Face data set: an id on the hub, or a local folder (Parquet, imagefolder).

    Args:
        split: which part of it.
        image, prompt, answers, task: its columns; `answers` holds a string or a list of strings.

    Raises:
        ModuleNotFoundError: the `datasets` package is not installed.
        ValueError: there is no such data set, split or column.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("data sets need: pip install 'dop_compile[datasets]'") from error
    try:
        table = datasets.load_dataset(name, split=split)
    except Exception as error:  # each of its loaders fails in its own way
        raise ValueError(f"data set {name!r}, split {split!r}: {_one_line(error)}") from error
    for column in filter(None, (image, prompt, answers, task)):
        if column not in table.column_names:
            raise ValueError(f"data set {name!r} has no column {column!r}; it has {', '.join(table.column_names)}")
    texts = table.select_columns(list(dict.fromkeys(column for column in (prompt, answers, task) if column)))
    return [
        Row(
            f"{name}, row {number}",
            (functools.partial(_cell, table, number, image),),
            str(line[prompt]),
            tuple(map(str, _listed(line[answers]))) if answers else (),
            str(line[task]) if task else "",
        )
        for number, line in enumerate(texts)
    ]


def _cell(table: Any, number: int, column: str) -> Any:
    return table[number][column]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def choose(rows: Sequence[Row], count: int | None, seed: int) -> list[Row]:
    """`count` rows drawn without replacement, in their order; all of them if None or if there are fewer."""
    if count is None or count >= len(rows):
        return list(rows)
    drawn = np.random.default_rng(seed).choice(len(rows), size=count, replace=False)
    return [rows[number] for number in sorted(drawn.tolist())]


def check_images(rows: Sequence[Row], *, skip_bad: bool = False) -> list[Row]:
    """Open every image once, before hours are spent.

    Args:
        skip_bad: leave out rows whose images do not decode, naming them on stderr.

    Raises:
        ValueError: an image does not decode (all are named), or no row is left.
    """
    good, bad = [], []
    for row in tqdm(rows, desc="checking images", leave=False, file=sys.stderr):
        try:
            row.open()
            good.append(row)
        except ValueError as error:
            bad.append(str(error))
    if bad and not skip_bad:
        raise ValueError(f"{'; '.join(bad)}. Remove these samples, or leave them out with --skip-bad")
    for message in bad:
        print(f"left out: {message}", file=sys.stderr)
    if not good:
        raise ValueError("no sample is left whose images decode")
    return good
