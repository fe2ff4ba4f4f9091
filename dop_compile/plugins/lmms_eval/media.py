"""From lmms-eval's messages to those of a chat template, with pictures and videos beside them.

Messages are those of `lmms_eval.protocol.ChatMessages`: of a role, with contents of type `text`, `image` (a PIL image
or a file), `video` (a file, frames, or a dictionary with `video_start` and `video_end` in seconds).

1. A picture goes where its content stands.
2. Tasks that mark places by `<image>` in a text behind the media: where there is a mark per medium they go there.
3. Marks without a medium of their own are removed, since a template writes the model's own.
(refused) Audio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from PIL import Image
from transformers import video_utils

from dop_compile.hf.images import load_image

__all__ = ["Clip", "Conversation", "read_messages", "sample_frames", "user_message"]

# Typed loosely: transformers annotates only a part of what is used here
hf: Any = transformers
videos: Any = video_utils

MARK = "<image>"
DECODERS = {"pyav": "is_av_available", "decord": "is_decord_available", "opencv": "is_cv2_available"}


@dataclass(frozen=True)
class Clip:
    """Frames of a video.

    Args:
        frames: (frames, height, width, 3) uint8.
        indices: of these among those of the part that is meant.
        total: number of frames of that part.
        fps: of the file, frames per second; None where frames were given without times.
    """

    frames: np.ndarray[Any, Any]
    indices: list[int]
    total: int
    fps: float | None = None

    def metadata(self) -> dict[str, Any]:
        """As a processor takes it for `video_metadata`."""
        height, width = self.frames.shape[1:3]
        seconds = None if self.fps is None else self.total / self.fps
        about = {"total_num_frames": self.total, "fps": self.fps, "frames_indices": self.indices}
        return {**about, "duration": seconds, "height": height, "width": width}


@dataclass
class Conversation:
    """One prompt.

    Args:
        messages: for `apply_chat_template`; pictures and videos are places in it.
        images: RGB pictures in their order.
        videos: in their order.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    videos: list[Clip] = field(default_factory=list)


def user_message(text: str, visuals: Sequence[Any] | None) -> list[dict[str, Any]]:
    """What a simple task asks: its pictures and videos, and behind them the text.

    Raises:
        TypeError: something that is no picture, no video and no file.
    """
    contents = []
    for visual in visuals or ():
        if isinstance(visual, Image.Image) or (isinstance(visual, str) and _is_picture(visual)):
            kind = "image"
        elif isinstance(visual, str | Mapping | list | tuple | np.ndarray):
            kind = str(visual.get("type", "video")) if isinstance(visual, Mapping) else "video"
        else:
            raise TypeError(f"expected pictures and videos of a task, got {type(visual).__name__}")
        contents.append({"type": kind, "url": visual})
    return [{"role": "user", "content": [*contents, {"type": "text", "text": text}]}]


def read_messages(messages: Sequence[Mapping[str, Any]], frames: int, *, frames_as_images: bool) -> Conversation:
    """A conversation with all its media in memory.

    Args:
        messages: with `role` and `content`.
        frames: of a video, evenly spaced; fewer where it has fewer.
        frames_as_images: give each frame as a picture, for models that take no videos.

    Raises:
        ValueError: contents of another type.
    """
    found = Conversation()
    for message in messages:
        contents: list[dict[str, Any]] = []
        waiting: list[dict[str, Any]] = []  # media, until it is known whether the text behind them has marks
        for content in message["content"]:
            kind = content["type"]
            if kind == "text":
                contents += _placed(str(content["text"]), waiting)
                waiting = []
            elif kind == "image":
                found.images.append(load_image(content["url"]))
                waiting.append({"type": "image"})
            elif kind == "video":
                span = (content.get("start_time"), content.get("end_time"))
                video = sample_frames(content["url"], frames, *span)
                if frames_as_images:
                    found.images += [Image.fromarray(frame) for frame in video.frames]
                    waiting += [{"type": "image"}] * len(video.frames)
                else:
                    found.videos.append(video)
                    waiting.append({"type": "video"})
            else:
                raise ValueError(f"the task has content of type {kind!r}; taken are text, image and video")
        found.messages.append({"role": message["role"], "content": contents + waiting})
    return found


def _placed(text: str, media: list[dict[str, Any]]) -> list[dict[str, Any]]:
    parts = text.split(MARK)
    if len(parts) - 1 != len(media) or not media:
        return [*media, {"type": "text", "text": text.replace(MARK, "")}]
    mixed: list[dict[str, Any]] = []
    for part, medium in zip(parts, [*media, None], strict=True):
        if part:
            mixed.append({"type": "text", "text": part})
        if medium is not None:
            mixed.append(medium)
    return mixed


def _is_picture(path: str) -> bool:
    return Path(path).suffix.lower() in Image.registered_extensions() and Path(path).suffix.lower() != ".gif"


def sample_frames(video: Any, count: int, start: float | None = None, end: float | None = None) -> Clip:
    """`count` evenly spaced frames, or all where there are fewer.

    Args:
        video: a file; a folder of pictures, in the order of their names; frames as an array or as PIL images; or a
            dictionary with `path` or `url`, and the part that is meant as `video_start` and `video_end`.
        start, end: in seconds, the part that is meant; of files only.

    Raises:
        ImportError: a file, and no package that decodes videos.
        ValueError: no frames, or a part of something that has no times.
    """
    if isinstance(video, Mapping):
        inner = next((video[name] for name in ("path", "url", "video") if name in video), None)
        return sample_frames(inner, count, video.get("video_start", start), video.get("video_end", end))
    if isinstance(video, str) and not Path(video).is_dir():
        return _decoded(video, count, start, end)
    if start is not None or end is not None:
        raise ValueError("frames that are given one by one have no times; a part of a video is taken of a file")
    if isinstance(video, str):
        video = [load_image(path) for path in sorted(Path(video).iterdir()) if _is_picture(str(path))]
    if video is None or not len(video):
        raise ValueError("the task has a video without frames")
    indices = _evenly(len(video), count)
    chosen = [video[number] for number in indices]
    frames = [np.asarray(load_image(f) if isinstance(f, Image.Image) else f, dtype=np.uint8) for f in chosen]
    return Clip(np.stack(frames), indices, len(video))


def _evenly(total: int, count: int) -> list[int]:
    """`count` evenly spaced numbers below `total`, first and last among them; all where there are fewer."""
    return [int(number) for number in np.linspace(0, total - 1, min(count, total)).round()]


def _decoded(file: str, count: int, start: float | None, end: float | None) -> Clip:
    if not Path(file).is_file():
        raise ValueError(f"video {file!r}: no such file or folder")
    decoder = next((name for name, known in DECODERS.items() if getattr(hf.utils, known)()), None)
    if decoder is None:
        raise ImportError(f"video {file!r}: no package that decodes videos; install av (or decord, or opencv-python)")
    part = slice(0, 0)

    def chosen(metadata: Any, **_: Any) -> Any:
        nonlocal part
        total, fps = int(metadata.total_num_frames), metadata.fps
        if total < 1:
            raise ValueError(f"video {file!r}: its file does not say how many frames it has; convert it to mp4")
        if (start is not None or end is not None) and not fps:
            raise ValueError(f"video {file!r}: its frame rate is not known, and a part of it is asked for")
        first = 0 if start is None else min(int(start * fps), total - 1)
        part = slice(first, total if end is None else max(first + 1, min(int(end * fps) + 1, total)))
        return first + np.array(_evenly(part.stop - first, count))

    frames, metadata = videos.load_video(file, sample_indices_fn=chosen, backend=decoder)
    total = part.stop - part.start
    return Clip(np.asarray(frames, dtype=np.uint8), _evenly(total, count), total, metadata.fps)
