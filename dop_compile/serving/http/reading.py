"""From a request's bytes to what an engine has prepared of it: read, checked, pictures decoded."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from starlette.requests import Request

from dop_compile.serving.http.body import parse_json, read_body
from dop_compile.serving.http.errors import as_api_error, invalid
from dop_compile.serving.http.messages import Place, fetch_images, read_messages
from dop_compile.serving.http.names import ModelIds
from dop_compile.serving.http.remote import RemoteImages
from dop_compile.serving.http.settings import Settings
from dop_compile.serving.http.wire import ChatRequest, read_chat
from dop_compile.serving.requests import Engine, Prepared, RequestError
from dop_compile.serving.requests import Request as EngineRequest

__all__ = ["Asked", "Reader"]

WORKERS = 2
"""Threads that decode pictures and prepare prompts."""


@dataclass(frozen=True)
class Asked:
    """A request that was understood.

    Args:
        chat: what the client sent.
        prepared: what the engine made of it.
        started: `time.perf_counter()` when the whole of it had come.
    """

    chat: ChatRequest
    prepared: Prepared
    started: float


class Reader:
    """Reads requests for one engine, off the event loop's thread where that takes long."""

    def __init__(self, engine: Engine, settings: Settings, ids: ModelIds):
        self._engine, self._settings, self._ids = engine, settings, ids
        self._remote = RemoteImages(settings.image_origins, settings.private_images, settings.limits)
        self._pool = ThreadPoolExecutor(WORKERS, "dop_compile prepare")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def read(self, request: Request) -> Asked:
        """What the body of a request asks for.

        Raises:
            ApiError: it is wrong, or larger than the limits.
            ClientDisconnect: the client has gone.
        """
        body = await read_body(request, self._settings.limits)
        started = time.perf_counter()
        run = asyncio.get_running_loop().run_in_executor
        chat = await run(self._pool, self._parse, body)
        del body  # the pictures in it are held by `chat`
        tier = self._tier(chat)
        fetched = await fetch_images(chat, self._remote)
        prepared = await run(self._pool, self._prepare, chat, tier, fetched)
        return Asked(chat, prepared, started)

    def _parse(self, body: bytes) -> ChatRequest:
        limits = self._settings.limits
        return read_chat(parse_json(body, limits), limits)

    def _tier(self, chat: ChatRequest) -> str | None:
        tier = self._ids.tier(chat.model)
        if tier is not None and chat.max_ms is not None:
            raise invalid("max_ms chooses a tier, and the model names one; leave one of them out", "max_ms")
        return tier

    def _prepare(self, chat: ChatRequest, tier: str | None, fetched: dict[Place, bytes]) -> Prepared:
        settings = self._settings
        temperature = chat.temperature or 0.0
        request = EngineRequest(
            messages=read_messages(chat, fetched, settings.limits),
            tier=tier,
            max_ms=chat.max_ms if tier is not None or chat.max_ms is not None else settings.max_ms,
            max_new_tokens=chat.max_completion_tokens or chat.max_tokens or settings.new_tokens,
            temperature=temperature,
            # Without a temperature nothing is drawn, so that there is nothing to restrict
            top_p=1.0 if chat.top_p is None or not temperature else chat.top_p,
            top_k=0 if chat.top_k is None or not temperature else chat.top_k,
            seed=chat.seed,
            stop=chat.stops,
        )
        try:
            return self._engine.prepare(request)
        except RequestError as error:
            raise as_api_error(error) from None
