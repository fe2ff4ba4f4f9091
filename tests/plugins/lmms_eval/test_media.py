"""Messages of lmms-eval become those of a chat template, with pictures and frames beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dop_compile.plugins.lmms_eval.media import read_messages, sample_frames, user_message


def plain(shade: int) -> Image.Image:
    return Image.new("RGB", (8, 6), (shade, shade, shade))


def film(frames: int) -> np.ndarray[Any, Any]:
    """Each frame is of its number."""
    return np.broadcast_to(np.arange(frames, dtype=np.uint8)[:, None, None, None], (frames, 6, 8, 3))


def read(messages: list[Any], frames: int = 3, frames_as_images: bool = False) -> Any:
    return read_messages(messages, frames, frames_as_images=frames_as_images)


def shades(images: list[Image.Image]) -> list[int]:
    return [image.getpixel((0, 0))[0] for image in images]


def test_media_stay_where_they_are_and_keep_their_order(tmp_path: Path) -> None:
    plain(7).convert("L").save(tmp_path / "a.png")
    content = [
        {"type": "text", "text": "first"},
        {"type": "image", "url": plain(1)},
        {"type": "text", "text": "then"},
        {"type": "image", "url": str(tmp_path / "a.png")},
        {"type": "video", "url": film(9)},
    ]
    found = read([{"role": "user", "content": content}, {"role": "assistant", "content": content[:1]}])
    assert shades(found.images) == [1, 7]
    assert [image.mode for image in found.images] == ["RGB", "RGB"]
    assert found.videos[0].indices == [0, 4, 8]
    written = [[part["type"] for part in message["content"]] for message in found.messages]
    assert written == [["text", "image", "text", "image", "video"], ["text"]]
    assert [message["role"] for message in found.messages] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a <image> b <image> c", ["a ", "image", " b ", "image", " c"]),
        ("<image><image>c", ["image", "image", "c"]),
        ("a <image> b", ["image", "image", "a  b"]),  # not as many marks as pictures: their places are not said
        ("no marks", ["image", "image", "no marks"]),
    ],
)
def test_marks_in_a_text_say_where_pictures_go(text: str, expected: list[str]) -> None:
    found = read(user_message(text, [plain(1), plain(2)]))
    assert [part.get("text", part["type"]) for part in found.messages[0]["content"]] == expected
    assert shades(found.images) == [1, 2]


def test_a_mark_without_a_picture_is_removed() -> None:
    assert read(user_message("look: <image>", None)).messages[0]["content"] == [{"type": "text", "text": "look: "}]


def test_frames_become_pictures_on_demand() -> None:
    found = read(user_message("what?", [film(10), plain(99)]), frames=4, frames_as_images=True)
    assert shades(found.images) == [0, 3, 6, 9, 99]
    assert not found.videos
    assert [part["type"] for part in found.messages[0]["content"]] == ["image"] * 5 + ["text"]


@pytest.mark.parametrize(("total", "count", "expected"), [(5, 8, [0, 1, 2, 3, 4]), (10, 1, [0]), (7, 3, [0, 3, 6])])
def test_frames_are_evenly_spaced(total: int, count: int, expected: list[int]) -> None:
    clip = sample_frames([plain(number) for number in range(total)], count)
    assert clip.indices == expected
    assert clip.frames[:, 0, 0, 0].tolist() == expected
    assert clip.metadata()["total_num_frames"] == total


def test_a_folder_of_frames_is_read_by_name(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        plain(number).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    assert sample_frames(str(tmp_path), 8).frames[:, 0, 0, 0].tolist() == [0, 1, 2]


def record(file: Path, codec: str, pixels: str) -> None:
    av = pytest.importorskip("av", reason="av decodes videos; it is not installed")
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 8, 6, pixels
        for frame in film(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def test_a_file_is_decoded_in_part(tmp_path: Path) -> None:
    file = tmp_path / "film.mov"
    record(file, "png", "rgb24")  # lossless
    whole = sample_frames(str(file), 20)
    np.testing.assert_array_equal(whole.frames, film(20))
    assert whole.fps == 10
    part = sample_frames({"type": "video", "path": str(file), "video_start": 0.5, "video_end": 1.3}, 3)
    assert part.frames[:, 0, 0, 0].tolist() == [5, 9, 13]
    assert (part.indices, part.total) == ([0, 4, 8], 9)
    assert part.metadata()["duration"] == pytest.approx(0.9)


def test_a_file_that_does_not_count_its_frames(tmp_path: Path) -> None:
    record(tmp_path / "film.mkv", "ffv1", "bgr0")
    with pytest.raises(ValueError, match="does not say how many frames it has; convert it"):
        sample_frames(str(tmp_path / "film.mkv"), 4)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="type 'audio'; taken are text, image and video"):
        read([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}])
    with pytest.raises(TypeError, match="expected pictures and videos of a task, got int"):
        user_message("what?", [3])
    with pytest.raises(ValueError, match="no such file or folder"):
        sample_frames(str(tmp_path / "none.mp4"), 4)
    with pytest.raises(ValueError, match="without frames"):
        sample_frames([], 4)
    with pytest.raises(ValueError, match="have no times"):
        sample_frames({"url": film(3), "video_start": 1.0}, 4)
