"""The page at `/`, to try the server by hand: its files, which hold nothing of anyone's."""

from __future__ import annotations

import json
from importlib.resources import files

from fastapi import FastAPI
from starlette.responses import Response

from dop_compile.serving.http.settings import Settings

__all__ = ["PATHS", "add_page"]

FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
SETTINGS = "/page.json"
PATHS = (*FILES, SETTINGS)


def add_page(app: FastAPI, settings: Settings) -> None:
    """Serve the page."""
    folder = files("dop_compile.serving.http")
    for path, (name, kind) in FILES.items():
        _add(app, path, folder.joinpath("static", name).read_bytes(), kind)
    _add(app, SETTINGS, json.dumps({"needs_key": settings.api_key is not None}).encode(), "application/json")


def _add(app: FastAPI, path: str, content: bytes, kind: str) -> None:
    async def show() -> Response:
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    app.add_api_route(path, show, include_in_schema=False, response_model=None)
