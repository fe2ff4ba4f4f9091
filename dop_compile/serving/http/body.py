"""A request's body, read and parsed within limits.

1. Its bytes are counted while they come; what is too long or too slow is not read to its end.
2. It is JSON: nested no deeper than allowed, which is looked at before it is parsed, without NaN and infinities,
   without a name that stands twice in an object, and all its texts can be written as UTF-8.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any, NoReturn

from starlette.requests import Request

from dop_compile.serving.http.errors import ApiError, invalid, late
from dop_compile.serving.http.settings import Limits

__all__ = ["parse_json", "read_body"]

TOKENS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{]|[\]}]', re.DOTALL)
"""A string, which brackets may stand in, or a bracket; linear in the body's length."""


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body of a JSON request.

    Raises:
        ApiError: another content type, too long, too slow.
        ClientDisconnect: the client has gone.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise invalid("Content-Type: expected application/json", status=415)
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and (len(declared) > 18 or int(declared) > limits.body_bytes):
        raise _too_long(limits)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size > limits.body_bytes:
                    raise _too_long(limits)
                parts.append(part)
    except TimeoutError:
        raise late(f"the request's body did not come within {limits.body_seconds:g} s", 408) from None
    return b"".join(parts)


def parse_json(body: bytes, limits: Limits) -> dict[str, Any]:
    """The object that a body is.

    Raises:
        ApiError: it is none.
    """
    _check_depth(body, limits.json_depth)
    try:
        found = json.loads(body.decode(), parse_constant=_no_number, object_pairs_hook=_each_once)
        _check_texts(found)
    except UnicodeError:
        raise invalid("the body holds text that is not valid Unicode") from None
    except ValueError as error:
        raise invalid(f"the body is not JSON: {_short(error)}") from None
    if not isinstance(found, dict):
        raise invalid("the body: expected a JSON object")
    return found


def _too_long(limits: Limits) -> ApiError:
    return invalid(f"the request is longer than {limits.body_bytes} bytes", code="request_too_large", status=413)


def _check_depth(body: bytes, limit: int) -> None:
    depth = 0
    for token in TOKENS.finditer(body):
        first = body[token.start()]
        if first in b"[{":
            depth += 1
            if depth > limit:
                raise invalid(f"the body is nested deeper than {limit} lists and objects")
        elif first in b"]}":
            depth -= 1


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in an object")
    return found


def _check_texts(value: Any) -> None:
    """UnicodeError for half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, list):
        for item in value:
            _check_texts(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            name.encode()
            _check_texts(item)


def _short(error: Exception) -> str:
    return str(error)[:200]
