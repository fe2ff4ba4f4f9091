"""Eight clients that ask one server at once, in turns whole and streamed, of all tiers."""

from __future__ import annotations

import asyncio
import gc
import random
from typing import Any

import openai
import psutil

from tests.serving.served import NAME, as_request, ask, data_url, picture, serving
from tests.serving.words import TIERS, WordEngine, answer

CLIENTS = 8
MEBIBYTE = 1 << 20


async def _one(client: openai.AsyncOpenAI, number: int) -> None:
    rng = random.Random(number)
    tier, limit = rng.choice(TIERS), rng.choice((3, 256))
    colour = (number % 256, 10, 20)
    pictures = [picture(colour)] if rng.random() < 0.5 else []
    text, finish, tokens = answer(as_request(f"question {number}", *pictures, max_new_tokens=limit), tier)
    settings: dict[str, Any] = {
        "model": f"{NAME}@{tier}",
        "messages": ask(f"question {number}", *map(data_url, pictures)),
        "max_tokens": limit,
    }
    if number % 2:
        found = await client.chat.completions.create(**settings)
        assert (found.choices[0].message.content, found.choices[0].finish_reason) == (text, finish)
        assert found.usage.completion_tokens == tokens
        return
    stream = await client.chat.completions.create(**settings, stream=True)
    if number % 10 == 0:  # a client that goes
        async for _ in stream:
            break
        await stream.close()
        return
    chunks = [chunk.choices[0] async for chunk in stream]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == text
    assert chunks[-1].finish_reason == finish


async def _ask(url: str, numbers: range) -> None:
    waiting = iter(numbers)

    async def client() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as one:
            for number in waiting:
                await _one(one, number)

    async with asyncio.TaskGroup() as clients:
        for _ in range(CLIENTS):
            clients.create_task(client())


def _bytes() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


def soak(requests: int) -> None:
    """Ask, and check every answer against the engine's own arithmetic; the second half must not take memory."""
    engine = WordEngine(max_batch=6)
    with serving(engine) as served:
        asyncio.run(_ask(served.url, range(requests // 2)))
        before = _bytes()
        asyncio.run(_ask(served.url, range(requests // 2, requests)))
        grown = _bytes() - before
        scheduler = served.server.scheduler
        assert (scheduler.waiting, scheduler.running, engine.running) == (0, 0, 0)
        assert engine.most == 6
        assert engine.admitted <= requests
        assert len(engine.threads) == 1
        # A connection that is not closed, or a request that is held, would be tens of kilobytes each
        assert grown < 8 * MEBIBYTE + requests * 1024
