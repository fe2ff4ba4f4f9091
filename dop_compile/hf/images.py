"""Pictures as transformers opens them: turned upright by their EXIF orientation, in RGB.

A camera stores how it was held beside the pixels. `transformers.image_utils.load_image`, which its processors and
pipelines use for paths, applies that; so does everything here that opens a picture or is handed one.
"""

from __future__ import annotations

import os
from typing import Any

from PIL import Image
from transformers import image_utils

__all__ = ["load_image"]

# Typed loosely: transformers annotates only a part of what is used here
utils: Any = image_utils


def load_image(image: str | os.PathLike[str] | Image.Image) -> Image.Image:
    """An upright picture in RGB; doing it twice is the same as once.

    Args:
        image: a file, or a PIL image, which is left as it is.

    Raises:
        OSError: no such file, not a picture (`PIL.UnidentifiedImageError`), or a damaged one; the message has the path.
        TypeError: something else.
    """
    if isinstance(image, str | os.PathLike):
        path = os.fspath(image)
        try:
            with Image.open(path) as opened:
                return load_image(opened)
        except Exception as error:  # damaged files raise whatever their decoder meets
            if isinstance(error, OSError) and path in str(error):
                raise
            raise OSError(f"{path}: {error}") from error
    if not isinstance(image, Image.Image):
        raise TypeError(f"expected a PIL image or a file, got {type(image).__name__}")
    upright: Image.Image = utils.load_image(image)
    return upright
