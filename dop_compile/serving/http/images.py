"""Pictures in requests, decoded within limits: a `data:` URL in, an upright RGB picture out.

1. What is decoded is a still PNG, JPEG, WebP or GIF; its size is looked at before its pixels are.
2. It is turned by its EXIF orientation and brought to RGB, as transformers does with files. Of grey pictures with 16
   bits the upper 8 are taken, where Pillow's own conversion would cut values off.
(refused) 3. Animated pictures, whose first frame would silently stand for all. 4. Other formats, other URLs.
"""

from __future__ import annotations

import base64
import binascii
import io
import re

from PIL import Image, ImageOps

from dop_compile.serving.http.errors import ApiError, invalid
from dop_compile.serving.http.settings import Limits

__all__ = ["decode_image", "from_data_url"]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
DATA_URL = re.compile(r"data:(?:image/[A-Za-z0-9.+-]+)?;base64,", re.IGNORECASE)
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")


def from_data_url(url: str, limits: Limits, param: str) -> Image.Image:
    """The picture in a `data:image/...;base64,` URL.

    Raises:
        ApiError: there is none, or it is larger than the limits.
    """
    head = DATA_URL.match(url)
    if head is None:
        raise invalid("expected a data URL, data:image/png;base64,...", param, "invalid_image_url")
    if (len(url) - head.end()) * 3 // 4 > limits.image_bytes + 3:
        raise _too_large(f"its file is larger than {limits.image_bytes} bytes", param)
    try:
        data = base64.b64decode(url[head.end() :].encode("ascii"), validate=True)
    except (binascii.Error, ValueError):
        raise invalid("the data URL does not hold base64", param, "invalid_image") from None
    return decode_image(data, limits, param)


def decode_image(data: bytes, limits: Limits, param: str) -> Image.Image:
    """A picture from the bytes of its file.

    Raises:
        ApiError: as `from_data_url`.
    """
    if len(data) > limits.image_bytes:
        raise _too_large(f"its file is larger than {limits.image_bytes} bytes", param)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            _check(opened, limits, param)
            opened.load()
            return _upright(opened)
    except ApiError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(f"it has more than the {limits.pixels} pixels that are left for it", param) from None
    except Exception:  # damaged files raise whatever their decoder meets
        expected = ", ".join(FORMATS)
        raise invalid(f"not a picture that can be decoded ({expected})", param, "invalid_image") from None


def _check(image: Image.Image, limits: Limits, param: str) -> None:
    width, height = image.size
    if min(width, height) < 1:
        raise invalid("the picture has no pixels", param, "invalid_image")
    if width * height > limits.pixels:
        raise _too_large(f"it has {width} x {height} pixels, and {limits.pixels} are left for it", param)
    if max(width, height) > limits.side:
        raise _too_large(f"it has {width} x {height} pixels, a side of more than {limits.side}", param)
    if max(width, height) > limits.aspect * min(width, height):
        shape = f"{width} x {height} pixels, one side more than {limits.aspect:g} times the other"
        raise invalid(f"the picture has {shape}", param, "invalid_image")
    if getattr(image, "n_frames", 1) > 1:
        raise invalid("the picture is animated; send one of its frames", param, "invalid_image")


def _upright(image: Image.Image) -> Image.Image:
    if image.mode in SIXTEEN_BITS:
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    return ImageOps.exif_transpose(image).convert("RGB")


def _too_large(why: str, param: str) -> ApiError:
    return invalid(f"the picture is too large: {why}", param, "image_too_large", status=413)
