"""A real server on a port of this machine, and what clients send to it."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
from PIL import Image

from dop_compile.serving.http.gate import LOOPBACK
from dop_compile.serving.http.server import Server, bind
from dop_compile.serving.http.settings import Settings
from dop_compile.serving.requests import Request

NAME = "words"


@dataclass(frozen=True)
class Served:
    """A server that runs."""

    url: str
    server: Server
    thread: threading.Thread

    def openai(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20)

    def end(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


@contextmanager
def serving(engine: Any, *, grace: int = 10, **settings: Any) -> Iterator[Served]:
    """Serve an engine while the block runs."""
    listener = bind("127.0.0.1", 0)
    ready = threading.Event()
    made = Settings(**{"name": NAME, "hosts": LOOPBACK, **settings})
    server = Server(engine, made, grace=grace, access_log=False, ready=ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    assert ready.wait(20)
    served = Served(f"http://127.0.0.1:{listener.getsockname()[1]}", server, thread)
    try:
        yield served
    finally:
        served.end()


def data_url(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def picture(colour: tuple[int, int, int] = (200, 30, 60)) -> Image.Image:
    return Image.new("RGB", (6, 4), colour)


def ask(text: str, *images: str) -> list[dict[str, Any]]:
    """Messages of one turn."""
    if not images:
        return [{"role": "user", "content": text}]
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


def as_request(text: str, *images: Image.Image, **settings: Any) -> Request:
    """What the engine should be given for `ask`."""
    content: Any = text
    if images:
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    given = {"tier": None, "max_ms": None, "max_new_tokens": 256, "temperature": 0.0, "top_p": 1.0, "top_k": 0}
    given |= {"seed": None, "stop": ()} | settings
    return Request(messages=[{"role": "user", "content": content}], **given)


def post(url: str, body: Any, **options: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=20, **options)
