"""From a client's messages to an engine's: pictures decoded, in the order in which they stand."""

from __future__ import annotations

import dataclasses
from typing import Any

from PIL import Image

from dop_compile.serving.http.images import decode_image, from_data_url
from dop_compile.serving.http.remote import RemoteImages
from dop_compile.serving.http.settings import Limits
from dop_compile.serving.http.wire import ChatRequest, ImagePart

__all__ = ["fetch_images", "read_messages"]

ROLES = {"developer": "system"}
"""OpenAI's newer name of a role, which chat templates do not know."""

Place = tuple[int, int]
"""Numbers of a message and of a part of it."""


async def fetch_images(chat: ChatRequest, remote: RemoteImages) -> dict[Place, bytes]:
    """The files of the pictures that are elsewhere.

    Raises:
        ApiError: one is not allowed, or cannot be had.
    """
    found = {}
    for place, part in _images(chat):
        if part.image_url.url[:5].lower() != "data:":
            found[place] = await remote.fetch(part.image_url.url, _param(place))
    return found


def read_messages(chat: ChatRequest, fetched: dict[Place, bytes], limits: Limits) -> list[dict[str, Any]]:
    """Messages as `dop_compile.serving.requests.Request` has them.

    Raises:
        ApiError: a picture cannot be decoded, or is too large.
    """
    pictures: dict[Place, Image.Image] = {}
    left = limits.pixels
    for place, part in _images(chat):
        rest = dataclasses.replace(limits, pixels=left)
        if place in fetched:
            picture = decode_image(fetched[place], rest, _param(place))
        else:
            picture = from_data_url(part.image_url.url, rest, _param(place))
        left -= picture.width * picture.height
        pictures[place] = picture
    messages = []
    for number, message in enumerate(chat.messages):
        content: Any = message.content
        if not isinstance(content, str):
            content = [
                {"type": "image", "image": pictures[number, at]}
                if isinstance(part, ImagePart)
                else {"type": "text", "text": part.text}
                for at, part in enumerate(content)
            ]
        messages.append({"role": ROLES.get(message.role, message.role), "content": content})
    return messages


def _images(chat: ChatRequest) -> list[tuple[Place, ImagePart]]:
    return [
        ((number, at), part)
        for number, message in enumerate(chat.messages)
        if not isinstance(message.content, str)
        for at, part in enumerate(message.content)
        if isinstance(part, ImagePart)
    ]


def _param(place: Place) -> str:
    return f"messages[{place[0]}].content[{place[1]}].image_url.url"
