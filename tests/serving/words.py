"""An engine without a model: what it answers is a function of the request alone, and anyone can compute it.

`answer` says it in one line of arithmetic, independently of steps, batches and cancellations.
"""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from dop_compile.serving.requests import Event, Request, RequestError

TIERS = ("100%", "28%")
CONTEXT = 4096
PICTURE_TOKENS = 16


def answer(request: Request, tier: str) -> tuple[str, str, int]:
    """Text, finish reason and number of tokens."""
    seed = hashlib.sha256()
    for message in request.messages:
        seed.update(message["role"].encode())
        for part in _parts(message):
            seed.update(part["text"].encode() if part["type"] == "text" else part["image"].tobytes())
    seed.update(tier.encode())
    digest = seed.hexdigest()
    words = [digest[n : n + 4] + " " for n in range(0, 4 * (4 + int(digest[0], 16)), 4)]
    text = ""
    for number, word in enumerate(words[: request.max_new_tokens], 1):
        text += word
        found = [text.find(stop) for stop in request.stop if stop in text]
        if found:
            return text[: min(found)], "stop", number
    if len(words) > request.max_new_tokens:
        return text, "length", request.max_new_tokens
    return text, "stop", len(words)


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


@dataclass(frozen=True)
class Prepared:
    request: Request
    tier: str
    prompt_tokens: int


@dataclass
class _Row:
    text: str
    finish: str
    tokens: int
    step: int = 0


@dataclass
class WordEngine:
    """Gives one piece of each row's answer per step.

    Args:
        seconds: that a step takes.
        gate: steps wait for it, if there is one.
        broken: what steps raise.
    """

    tiers: tuple[str, ...] = TIERS
    context_length: int = CONTEXT
    max_batch: int = 4
    seconds: float = 0.0
    gate: threading.Event | None = None
    broken: Exception | None = None
    rows: dict[int, _Row] = field(default_factory=dict)
    admitted: int = 0
    cancelled: list[int] = field(default_factory=list)
    most: int = 0
    closed: bool = False
    threads: set[int] = field(default_factory=set)

    @property
    def running(self) -> int:
        return len(self.rows)

    def prepare(self, request: Request) -> Prepared:
        if request.max_ms is not None and request.max_ms < 1:
            raise RequestError(f"max_ms: no tier fits {request.max_ms:g} ms")
        tier = request.tier or (self.tiers[1] if request.max_ms is not None and request.max_ms < 50 else self.tiers[0])
        parts = [part for message in request.messages for part in _parts(message)]
        tokens = sum(len(part["text"].split()) if part["type"] == "text" else PICTURE_TOKENS for part in parts)
        if tokens + request.max_new_tokens > self.context_length:
            raise RequestError(f"{tokens} tokens and {request.max_new_tokens} new ones are too many")
        return Prepared(request, tier, tokens)

    def admit(self, prepared: Any) -> int:
        assert self.running < self.max_batch
        self.threads.add(threading.get_ident())
        self.admitted += 1
        self.rows[self.admitted] = _Row(*answer(prepared.request, prepared.tier))
        self.most = max(self.most, self.running)
        return self.admitted

    def step(self) -> list[Event]:
        self.threads.add(threading.get_ident())
        if self.gate is not None:
            self.gate.wait(10)
        time.sleep(self.seconds)
        if self.broken is not None:
            raise self.broken
        events = []
        for number, row in list(self.rows.items()):
            row.step += 1
            last = row.step == row.tokens
            piece = row.text[5 * (row.step - 1) : None if last else 5 * row.step]
            events.append(Event(number, piece, 1, row.finish if last else None))
            if last:
                del self.rows[number]
        return events

    def cancel(self, id: int) -> None:
        self.threads.add(threading.get_ident())
        self.cancelled.append(id)
        self.rows.pop(id, None)

    def close(self) -> None:
        self.closed = True
