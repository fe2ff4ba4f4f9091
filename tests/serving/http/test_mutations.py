"""A thousand damaged requests: each is answered, none by a failure of the server, and the server goes on."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from typing import Any

import httpx
import pytest

from dop_compile.serving.http.app import create_app
from dop_compile.serving.http.gate import LOOPBACK
from dop_compile.serving.http.settings import Limits, Settings
from dop_compile.serving.scheduler import Scheduler
from tests.serving.served import NAME, ask, data_url, picture
from tests.serving.words import WordEngine

PATHS = ("/v1/chat/completions", "/v1/chat/patches", "/v1/models/x", "/v1/completions", "/%00", "//", "/health")
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, 1e-308),
    *("", " ", "\0", "\ud800", "é" * 50, "{{ 7 * 7 }}", "{% for x in y %}", "<image>", "</s>", "\u202e", "x" * 10_000),
    *([], {}, [[]], [None], {"type": "text"}, {"type": "image_url", "image_url": {"url": 3}}, {"": ""}),
    *(
        "data:",
        "data:image/png;base64,",
        "data:image/png;base64,AAAA",
        "data:text/html;base64,AAAA",
        "http://[::1",
        "file:///",
    ),
)
"""What stands in for values."""


def sound() -> dict[str, Any]:
    return {
        "model": NAME,
        "messages": [{"role": "system", "content": "Be short."}, *ask("What is this?", data_url(picture()))],
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 1,
        "stop": ["zz"],
        "stream": False,
        "stream_options": None,
        "max_ms": 20,
    }


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


def changed(rng: random.Random) -> Any:
    """A request of which some values are others, gone, doubled, or nested."""
    body: Any = sound()
    for _ in range(rng.randint(1, 3)):
        path = rng.choice(places(body) or [()])
        if not path:
            return rng.choice(ODD)
        where = body
        for step in path[:-1]:
            where = where[step]
        kind = rng.randrange(4)
        if kind == 0:
            where[path[-1]] = copy.deepcopy(rng.choice(ODD))
        elif kind == 1:
            del where[path[-1]]
        elif kind == 2 and isinstance(where, list):
            where.extend([copy.deepcopy(where[path[-1]])] * rng.randint(1, 12))
        elif kind == 2:
            where[rng.choice(("n", "tools", "extra", "logprobs", "stream"))] = copy.deepcopy(rng.choice(ODD))
        else:
            for _ in range(rng.choice((1, 30))):
                where[path[-1]] = [where[path[-1]]]
    return body


def damaged(rng: random.Random) -> bytes:
    """A request's bytes."""
    content = json.dumps(changed(rng), ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass")
    kind = rng.randrange(6)
    at = rng.randrange(len(content) + 1)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + rng.randbytes(rng.randint(1, 8)) + content[at:]
    if kind == 2:
        return rng.choice((b"[" * 100_000, b'{"a":' * 100_000, b'"' + b"\\" * 100_001, b"NaN", b"1" * 10_000, b""))
    return content


async def send_all(seed: int, count: int) -> list[httpx.Response]:
    scheduler = Scheduler(WordEngine(), queue=8)
    settings = Settings(name=NAME, hosts=LOOPBACK, limits=Limits(body_bytes=1 << 20))
    application = create_app(scheduler, settings)
    scheduler.start()
    rng = random.Random(seed)
    responses = []
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(application), base_url="http://localhost", timeout=None
    ) as client:
        for _ in range(count):
            path = PATHS[0] if rng.random() < 0.85 else rng.choice(PATHS)
            method = "POST" if rng.random() < 0.97 else rng.choice(("GET", "PUT", "DELETE", "BREW"))
            kind = (
                "application/json"
                if rng.random() < 0.97
                else rng.choice(("", "text/plain", 'application/json; x="', "é"))
            )
            host = "localhost" if rng.random() < 0.98 else rng.choice(("evil.example", "", "[", "127.0.0.1:99999"))
            headers = [(b"Content-Type", kind.encode()), (b"Host", host.encode())]
            async with asyncio.timeout(5):
                response = await client.request(method, path, content=damaged(rng), headers=headers)
            responses.append(response)
        async with asyncio.timeout(5):
            responses.append(await client.post(PATHS[0], json=sound()))
    scheduler.drain()
    assert await asyncio.to_thread(scheduler.join, 5)
    return responses


@pytest.mark.parametrize("seed", range(2))
def test_damaged_requests_are_answered(seed: int) -> None:
    *responses, last = asyncio.run(send_all(seed, 500))
    statuses = [response.status_code for response in responses]
    assert max(statuses) < 500
    assert {200, 400, 404, 405, 413, 415, 421} & set(statuses) >= {200, 400, 404, 405, 415}
    for response in responses:
        if response.status_code != 200:
            error = response.json()["error"]
            assert error["message"]
            assert set(error) == {"message", "type", "param", "code"}
            assert len(response.content) < 2000  # nothing that was sent is sent back at length
    assert last.status_code == 200
