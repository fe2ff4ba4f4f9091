"""Answers in OpenAI's shape: whole, or piece by piece as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

__all__ = ["DONE", "Answer", "sse"]

DONE = "data: [DONE]\n\n"


def sse(data: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


@dataclass
class Answer:
    """One answer as it grows.

    Args:
        model: id of the tier that answers.
        tier: its name.
        prompt_tokens: of the prompt, visual ones included, before reduction.
        started: `time.perf_counter()` when the whole request had come.
    """

    model: str
    tier: str
    prompt_tokens: int
    started: float
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    texts: list[str] = field(default_factory=list)
    tokens: int = 0
    first_seconds: float | None = None
    seconds: float = 0.0

    def add(self, text: str, tokens: int) -> None:
        """What one event brings."""
        self.seconds = time.perf_counter() - self.started
        if self.first_seconds is None:
            self.first_seconds = self.seconds
        self.texts.append(text)
        self.tokens += tokens

    @property
    def usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.tokens, "total_tokens": total}

    @property
    def details(self) -> dict[str, Any]:
        """An addition to OpenAI's fields: the tier, and milliseconds since the whole request had come."""
        first = self.seconds if self.first_seconds is None else self.first_seconds
        return {"tier": self.tier, "first_token_ms": round(1e3 * first, 3), "total_ms": round(1e3 * self.seconds, 3)}

    def whole(self, finish: str) -> dict[str, Any]:
        """The body of an answer that comes at once."""
        message = {"role": "assistant", "content": "".join(self.texts), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self.usage, "dop_compile": self.details}

    def chunk(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        """One piece."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        more = {} if finish is None else {"dop_compile": self.details}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **more}

    def usage_chunk(self) -> dict[str, Any]:
        """The last piece, for those who asked for it."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}
