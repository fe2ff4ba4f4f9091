"""Canvases and questions: deterministic, of disjoint scans, and with answers that are right."""

from __future__ import annotations

import re

import numpy as np
import pytest
from sklearn.datasets import load_digits

from digits_vlm import data


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def test_a_canvas_is_a_function_of_split_seed_and_number() -> None:
    for arguments in (("train", 3), ("validation", 3), ("validation", 3, 1)):
        assert np.array_equal(data.canvas(*arguments).pixels, data.canvas(*arguments).pixels)
    assert not np.array_equal(data.canvas("train", 3).pixels, data.canvas("validation", 3).pixels)
    assert not np.array_equal(data.canvas("train", 3).pixels, data.canvas("train", 3, 1).pixels)
    with pytest.raises(ValueError, match="split 'test'"):
        data.canvas("test", 0)


def test_splits_share_no_scan() -> None:
    train, validation = (data._scans(split)[0] for split in ("train", "validation"))
    assert len(train) + len(validation) == len(load_digits().images)
    seen = {scan.tobytes() for scan in train}
    assert not any(scan.tobytes() in seen for scan in validation)


def test_digits_stand_where_the_canvas_says_and_the_rest_is_empty() -> None:
    counts = set()
    for number in range(60):
        canvas = data.canvas("validation", number)
        counts.add(int((canvas.digits >= 0).sum()))
        background = np.ones_like(canvas.pixels, dtype=bool)
        for row, column in np.argwhere(canvas.digits >= 0):
            top, left = canvas.corners[row, column]
            assert (top // data.CELL, left // data.CELL) == (row, column)
            window = np.s_[top : top + data.DIGIT, left : left + data.DIGIT]
            background[window] = False
            assert canvas.pixels[window].max() > 120
        assert canvas.pixels[background].max(initial=0) < 100
    assert counts == set(range(1, 10))


def answer_by_reading(digits: np.ndarray, question: str) -> str:
    """The answer from the words of the question alone."""
    asked = words(question)
    numbers = [int(word) for word in asked if word.isdigit()]
    if question.startswith("Read row"):
        return " ".join(str(d) for d in digits[numbers[0] - 1] if d >= 0) or "none"
    if question.startswith("How many"):
        return str((digits == numbers[0]).sum())
    if question.startswith("Is there any"):
        return "yes" if numbers[0] in digits else "no"
    digit = digits[numbers[0] - 1, numbers[1] - 1]
    if len(numbers) == 2:
        return str(digit) if digit >= 0 else "none"
    return asked[asked.index(str(digit), 9) - 1]


@pytest.mark.parametrize("kind", data.KINDS)
def test_answers(kind: str) -> None:
    rng = np.random.default_rng(0)
    answers = set()
    for number in range(200):
        canvas = data.canvas("train", number)
        question = data.ask(canvas, kind, rng)
        assert question.answer == answer_by_reading(canvas.digits, question.text)
        answers.add(question.answer)
        if kind == "choice":
            options = [word for word in words(question.text.split("?")[1]) if word.isdigit()]
            assert len(set(options)) == len(data.LETTERS)
    expected = {"read": 11, "yesno": 2, "choice": 4, "count": 7, "row": 50}[kind]
    assert len(answers) >= expected


def test_hints_are_true_and_stand_behind_the_word_that_they_follow_from() -> None:
    rng = np.random.default_rng(0)
    for number in range(100):
        canvas = data.canvas("train", number)
        for kind in ("yesno", "count"):
            question = data.ask(canvas, kind, rng)
            ((place, count),) = question.hints
            assert count == str((canvas.digits == int(words(question.text)[place])).sum())
        question = data.ask(canvas, "choice", rng)
        (place, digit), *options = question.hints
        assert words(question.text)[place] == "?"
        for (option, verdict), letter in zip(options, data.LETTERS, strict=True):
            assert words(question.text)[option - 1] == letter
            assert (verdict == "yes") == (words(question.text)[option] == digit) == (question.answer == letter)


def test_examples_are_images_and_text() -> None:
    found = list(data.examples("validation", 10))
    assert [example.kind for example in found] == [*data.KINDS, *data.KINDS]
    assert all(example.image.size == (data.CANVAS, data.CANVAS) for example in found)
    assert all(example.image.mode == "RGB" for example in found)
    assert all(example.prompt.count("<image>") == 1 for example in found)
    assert len({example.prompt for example in found}) > 5


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="kind 'poem': expected one of read, row"):
        data.ask(data.canvas("train", 0), "poem", np.random.default_rng(0))
