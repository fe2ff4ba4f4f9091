"""Canvases of handwritten digits, and questions about them.

The digits are the 1,797 real scans of `sklearn.datasets.load_digits` (8 x 8 pixels, 16 grey levels). A canvas has
three rows and three columns; some of its cells hold a scan, enlarged, turned and shifted a little, the rest is empty.
Training and validation canvases are made of different scans, and every canvas is a function of its split, seed and
number alone.

    for example in examples("validation", count=5):
        example.image, example.prompt, example.answer

Kinds of question: `read` one cell, `row` (several answer tokens), `yesno`, `count`, `choice` (options in the text).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

__all__ = ["CANVAS", "GRID", "KINDS", "SYSTEM", "Canvas", "Example", "Question", "ask", "canvas", "examples", "prompt"]

GRID = 3
CELL = 32
DIGIT = 24
STEP = 4
"""Digits are shifted by multiples of this many pixels."""
CANVAS = GRID * CELL
"""Side of a canvas in pixels."""

SYSTEM = "Look at the handwritten digits."
KINDS = ("read", "row", "yesno", "count", "choice")
SPLITS = ("train", "validation")
LETTERS = ("a", "b", "c", "d")
VALIDATION_SCANS = 300


@dataclass(frozen=True)
class Canvas:
    """A picture and what is on it.

    Args:
        pixels: (CANVAS, CANVAS) uint8.
        digits: (GRID, GRID) the digit of each cell, -1 where it is empty.
        corners: (GRID, GRID, 2) row and column of each digit's top left pixel.
    """

    pixels: np.ndarray
    digits: np.ndarray
    corners: np.ndarray

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels).convert("RGB")


@dataclass(frozen=True)
class Question:
    """`hints`: answers to steps on the way, by the number of the question's word after which they are known."""

    kind: str
    text: str
    answer: str
    hints: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Example:
    image: Image.Image
    prompt: str
    answer: str
    kind: str


def prompt(question: str) -> str:
    """A question as the models were trained to read it; `<image>` stands where the picture goes."""
    return f"{SYSTEM} <image> {question} Answer:"


@cache
def _scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    """(scans, DIGIT, DIGIT) in 0..1 and their digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    chosen = {"validation": order[:VALIDATION_SCANS], "train": order[VALIDATION_SCANS:]}
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected {' or '.join(map(repr, SPLITS))}")
    enlarged = [
        np.asarray(
            Image.fromarray((scan * (255 / 16)).astype(np.uint8)).resize((DIGIT, DIGIT), Image.Resampling.BICUBIC)
        )
        for scan in data.images[chosen[split]]
    ]
    return np.stack(enlarged), data.target[chosen[split]]


def canvas(split: str, number: int, seed: int = 0, full: bool = False) -> Canvas:
    """Canvas `number` of a split: one to nine digits of one to six kinds, wherever the draw puts them.

    With `full`, a digit in every cell, of any kinds.
    """
    scans, labels = _scans(split)
    rng = np.random.default_rng([seed, SPLITS.index(split), number])
    kinds = rng.choice(10, size=10 if full else rng.integers(1, 7), replace=False)
    cells = rng.choice(GRID * GRID, size=GRID * GRID if full else rng.integers(1, GRID * GRID + 1), replace=False)
    picture = np.full((CANVAS, CANVAS), rng.uniform(0, 0.15))
    digits = np.full((GRID, GRID), -1)
    corners = np.zeros((GRID, GRID, 2), dtype=int)
    for cell in cells:
        digit = rng.choice(kinds)
        scan = Image.fromarray(scans[rng.choice(np.flatnonzero(labels == digit))])
        ink = np.asarray(scan.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR), dtype=float) / 255
        row, column = divmod(int(cell), GRID)
        top, left = np.array([row, column]) * CELL + STEP * rng.integers(0, (CELL - DIGIT) // STEP + 1, size=2)
        window = picture[top : top + DIGIT, left : left + DIGIT]
        np.maximum(window, ink * rng.uniform(0.6, 1.0), out=window)
        digits[row, column], corners[row, column] = digit, (top, left)
    picture += rng.normal(0, 0.04, picture.shape)
    return Canvas((picture.clip(0, 1) * 255).astype(np.uint8), digits, corners)


def ask(canvas: Canvas, kind: str, rng: np.random.Generator) -> Question:
    """A question of a kind about a canvas, and its answer in words."""
    row, column = (int(x) for x in rng.integers(0, GRID, size=2))
    if kind in ("read", "choice") and rng.random() < (0.9 if kind == "read" else 1.0):
        filled = np.argwhere(canvas.digits >= 0)
        row, column = (int(x) for x in filled[rng.integers(len(filled))])
    digit = int(canvas.digits[row, column])
    name = str(digit) if digit >= 0 else "none"
    where = f"Which digit is in row {row + 1} column {column + 1}?"
    if kind == "read":
        return Question(kind, where, name)
    if kind == "row":
        found = [str(d) for d in canvas.digits[row] if d >= 0]
        return Question(kind, f"Read row {row + 1}.", " ".join(found) or "none")
    present = sorted({int(d) for d in canvas.digits.flat if d >= 0})
    absent = [d for d in range(10) if d not in present]
    if kind in ("yesno", "count"):
        known = rng.random() < (0.5 if kind == "yesno" else 0.8)
        asked = int(rng.choice(present if known else absent))
        count = str(int((canvas.digits == asked).sum()))
        if kind == "count":
            return Question(kind, f"How many {asked} are there?", count, ((2, count),))
        return Question(kind, f"Is there any {asked}?", "yes" if known else "no", ((3, count),))
    if kind == "choice":
        others = [d for d in present if d != digit]
        rest = [d for d in absent if d != digit]
        wrong = (
            [*rng.permutation(others), *rng.permutation(rest)] if rng.random() < 0.5 else rng.permutation(others + rest)
        )
        options = [int(d) for d in rng.permutation([digit, *wrong[: len(LETTERS) - 1]])]
        listed = ", ".join(f"{letter} {option}" for letter, option in zip(LETTERS, options, strict=True))
        first = len(where.split()) + 1  # a question mark is a word of its own
        hints = [(first - 1, name)]
        hints += [(first + 3 * i + 1, "yes" if option == digit else "no") for i, option in enumerate(options)]
        return Question(kind, f"{where} {listed}.", LETTERS[options.index(digit)], tuple(hints))
    raise ValueError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")


def examples(split: str, count: int, kinds: tuple[str, ...] = KINDS, seed: int = 0) -> Iterator[Example]:
    """`count` questions, one per canvas, the kinds in turn."""
    for number in range(count):
        drawn = canvas(split, number, seed)
        kind = kinds[number % len(kinds)]
        question = ask(drawn, kind, np.random.default_rng([seed, 2, number]))
        yield Example(drawn.image, prompt(question.text), question.answer, kind)
