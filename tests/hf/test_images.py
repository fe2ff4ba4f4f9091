"""Every door through which pictures come turns them upright as transformers does, and names what it cannot open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image as reference

from dop_compile.commands.inputs import read_images
from dop_compile.hf import prompts as processing
from dop_compile.hf.images import load_image
from dop_compile.onnx.run.inputs import as_images
from dop_compile.plugins.lmms_eval.media import read_messages, sample_frames, user_message
from dop_compile.search.samples import Row

ORIENTATION = 0x0112


@pytest.fixture(params=range(1, 9))
def photo(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """16 x 24 pixels without a symmetry, as a camera held in one of the eight ways stores them."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = request.param
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    return tmp_path / "photo.png"


class Pictures:
    """A processor that hands its pictures back."""

    chat_template = None

    def __call__(self, images: Any, text: str, return_tensors: str) -> Any:
        return images


def of_message(picture: Any) -> Any:
    return read_messages(user_message("?", [picture]), 1, frames_as_images=False).images[0]


def frame(video: Any) -> Image.Image:
    return Image.fromarray(sample_frames(video, 1).frames[0])


DOORS: dict[str, Callable[[Path], Any]] = {
    "the loader": load_image,
    "commands": lambda path: read_images([str(path)])[0],
    "samples of a file": lambda path: Row("row", (str(path),), "").open()[0],
    "samples of a data set": lambda path: Row("row", (lambda: Image.open(path),), "").open()[0],
    "OnnxPipeline, a file": lambda path: as_images(path)[0],
    "OnnxPipeline, a picture": lambda path: as_images([Image.open(path)])[0],
    "lmms-eval, a file": lambda path: of_message(str(path)),
    "lmms-eval, a picture": lambda path: of_message(Image.open(path)),
    "lmms-eval, a folder of frames": lambda path: frame(str(path.parent)),
    "lmms-eval, frames": lambda path: frame([Image.open(path)]),
    "prompts": lambda path: processing.prompt_inputs(Pictures(), "?", [Image.open(path)])[0],
}


@pytest.mark.parametrize("door", DOORS)
def test_pictures_are_upright_as_those_of_transformers(door: str, photo: Path) -> None:
    expected, found = reference(str(photo)), DOORS[door](photo)
    assert found.mode == "RGB"
    assert np.array_equal(np.asarray(found), np.asarray(expected))
    assert np.array_equal(np.asarray(load_image(found)), np.asarray(expected)), "twice is the same as once"


def test_a_given_picture_is_left_as_it_is(photo: Path) -> None:
    given = Image.open(photo)
    orientation, size = given.getexif()[ORIENTATION], given.size
    load_image(given)
    assert (given.getexif()[ORIENTATION], given.size) == (orientation, size)


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        load_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(OSError, match=r"text\.png"):
        load_image(tmp_path / "text.png")
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:1000])
    with pytest.raises(OSError, match=r"cut\.png.*truncated"):
        as_images(str(tmp_path / "cut.png"))
    with pytest.raises(TypeError, match="expected a PIL image or a file, got ndarray"):
        load_image(noise)  # type: ignore[arg-type]
