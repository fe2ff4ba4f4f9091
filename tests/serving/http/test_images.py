"""Pictures in requests: what is decoded, and what is refused before it costs anything."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dop_compile.hf.images import load_image
from dop_compile.serving.http.errors import ApiError
from dop_compile.serving.http.images import from_data_url
from dop_compile.serving.http.messages import read_messages
from dop_compile.serving.http.settings import Limits
from dop_compile.serving.http.wire import read_chat
from tests.serving.served import ask, data_url

LIMITS = Limits()


def decoded(url: str, **limits: Any) -> Image.Image:
    return from_data_url(url, Limits(**limits), "here")


def refused(url: str, **limits: Any) -> ApiError:
    with pytest.raises(ApiError) as failed:
        decoded(url, **limits)
    assert failed.value.param == "here"
    return failed.value


def noise(mode: str = "RGB", size: tuple[int, int] = (31, 17)) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.frombytes(mode, size, values.tobytes())


def bomb(width: int, height: int) -> str:
    """A PNG that says it is that large, in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK"])
def test_a_still_picture_is_what_transformers_makes_of_it(kind: str, mode: str) -> None:
    image = noise("RGB").convert(mode)
    if (kind, mode) in {
        ("JPEG", "P"),
        ("JPEG", "RGBA"),
        ("PNG", "CMYK"),
        ("WEBP", "CMYK"),
        ("GIF", "CMYK"),
        ("GIF", "RGBA"),
    }:
        image = image.convert("RGB")
    url = data_url(image, kind)
    file = io.BytesIO(base64.b64decode(url.partition(",")[2]))
    assert decoded(url).tobytes() == load_image(Image.open(file)).tobytes()
    assert decoded(url).mode == "RGB"


def test_a_turned_picture_stands_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # held turned by a quarter
    image = noise()
    assert decoded(data_url(image, exif=exif)).tobytes() == image.transpose(Image.Transpose.ROTATE_270).tobytes()


def test_sixteen_bits_keep_their_upper_eight() -> None:
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    found = np.asarray(decoded(data_url(Image.fromarray(values))))
    assert np.array_equal(found[..., 0], values >> 8)


def test_the_pictures_of_a_request_have_a_limit_together() -> None:
    urls = [data_url(noise())] * 2
    chat = read_chat({"model": "m", "messages": ask("Hi.", *urls)}, LIMITS)
    assert len(read_messages(chat, {}, Limits(pixels=2 * 31 * 17))[0]["content"]) == 3
    with pytest.raises(ApiError) as failed:
        read_messages(chat, {}, Limits(pixels=2 * 31 * 17 - 1))
    assert (failed.value.status, failed.value.param) == (413, "messages[0].content[1].image_url.url")


def test_an_animated_picture_is_refused() -> None:
    more = [noise(size=(8, 8)), Image.new("RGB", (8, 8), "red")]
    for kind in ("GIF", "WEBP", "PNG"):
        url = data_url(Image.new("RGB", (8, 8)), kind, save_all=True, append_images=more)
        assert "animated" in refused(url).message


@pytest.mark.parametrize("size", [(30_000, 30_000), (65_000, 65_000), (2**31 - 1, 2**31 - 1), (7000, 7000)])
def test_a_picture_of_too_many_pixels_is_not_decoded(size: tuple[int, int]) -> None:
    error = refused(bomb(*size))
    assert (error.status, error.code) == (413, "image_too_large")


def test_sides_and_shapes_have_limits() -> None:
    assert refused(bomb(30_000, 1000)).status == 413
    assert "more than 50 times" in refused(bomb(5100, 100)).message
    assert decoded(data_url(Image.new("L", (100, 2)))).size == (100, 2)
    assert refused(data_url(noise()), pixels=31 * 17 - 1).status == 413
    assert refused(data_url(noise()), image_bytes=100).status == 413


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,",
        "data:image/png;base64,AAAA",
        "data:image/png;base64,====",
        "data:image/png;base64,é",
        "data:image/png,raw",
        "data:text/html;base64,AAAA",
        bomb(0, 0),
        "data:image/svg+xml;base64," + base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'/>").decode(),
    ],
)
def test_what_is_no_picture_is_refused(url: str) -> None:
    assert refused(url).status == 400


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "ICO", "PPM", "PDF"])
def test_other_formats_are_not_opened(kind: str) -> None:
    assert refused(data_url(noise(), kind).replace(f"image/{kind.lower()}", "image/png")).code == "invalid_image"


def test_damaged_files_are_refused() -> None:
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        head, _, content = data_url(noise(), kind).partition(",")
        data = base64.b64decode(content)
        for cut in (len(data) // 4, len(data) // 2, len(data) * 3 // 4):
            assert refused(f"{head},{base64.b64encode(data[:cut]).decode()}").code == "invalid_image"
