"""The application: routes, and what begins and ends with it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from dop_compile.serving.http import page
from dop_compile.serving.http.chat import Chat
from dop_compile.serving.http.errors import ApiError, invalid
from dop_compile.serving.http.gate import Gate
from dop_compile.serving.http.metrics import Metrics
from dop_compile.serving.http.names import ModelIds
from dop_compile.serving.http.patches import Patches
from dop_compile.serving.http.reading import Reader
from dop_compile.serving.http.settings import Settings
from dop_compile.serving.http.wire import ChatRequest
from dop_compile.serving.scheduler import Scheduler
from dop_compile.version import VERSION

__all__ = ["create_app"]

HEALTH = "/health"


def create_app(scheduler: Scheduler, settings: Settings) -> ASGIApp:
    """An application that answers on a scheduler, which it starts, and drains when it ends."""
    ids = ModelIds(settings.name, scheduler.engine.tiers, int(time.time()))
    metrics = Metrics(scheduler)
    reader = Reader(scheduler.engine, settings, ids)
    chat = Chat(scheduler, reader, settings, ids, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        scheduler.start()
        try:
            yield
        finally:
            scheduler.drain()
            await run_in_threadpool(scheduler.join)
            reader.close()

    # The documentation pages of FastAPI load scripts from elsewhere
    app = FastAPI(title="dop_compile", version=VERSION, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    _add_chat(app, chat, Patches(scheduler, reader))
    _add_models(app, ids)
    _add_state(app, scheduler, metrics)
    page.add_page(app, settings)
    return Gate(app, settings.api_key, settings.hosts, {HEALTH, *page.PATHS})


def _add_chat(app: FastAPI, chat: Chat, patches: Patches) -> None:
    schema = {"requestBody": {"required": True, "content": {"application/json": {"schema": _schema()}}}}

    @app.post("/v1/chat/completions", openapi_extra=schema, response_model=None)
    async def complete(request: Request) -> Response:
        return await chat.complete(request)

    @app.post("/v1/chat/patches", openapi_extra=schema, response_model=None)
    async def show(request: Request) -> Response:
        return await patches.show(request)


def _add_models(app: FastAPI, ids: ModelIds) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return ids.all()

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        return ids.entry(model)


def _add_state(app: FastAPI, scheduler: Scheduler, metrics: Metrics) -> None:
    @app.get(HEALTH, response_model=None)
    async def health() -> Response:
        if scheduler.accepts:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "failed" if scheduler.is_broken else "shutting down"}, 503)

    @app.get("/metrics", response_model=None)
    async def numbers() -> Response:
        return Response(metrics.text(), media_type=metrics.content_type)


def _schema() -> dict[str, Any]:
    return ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")


async def _answer_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _answer_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    found = invalid(str(error.detail), status=error.status_code)
    found.headers.update(error.headers or {})
    return found.response()
