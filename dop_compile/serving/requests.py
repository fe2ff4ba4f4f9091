"""provisional"""
from __future__ import annotations
from dataclasses import dataclass
from typing import Any, Protocol


class RequestError(ValueError):
    pass


@dataclass(frozen=True)
class Request:
    messages: list[dict[str, Any]]
    tier: str | None = None
    max_ms: float | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()


class Prepared(Protocol):
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def tier(self) -> str: ...


@dataclass(frozen=True)
class Event:
    id: int
    text: str
    tokens: int
    finish: str | None


class Engine(Protocol):
    @property
    def tiers(self) -> tuple[str, ...]: ...
    @property
    def context_length(self) -> int: ...
    @property
    def max_batch(self) -> int: ...
    @property
    def running(self) -> int: ...
    def prepare(self, request: Request) -> Prepared: ...
    def admit(self, prepared: Any) -> int: ...
    def step(self) -> list[Event]: ...
    def cancel(self, id: int) -> None: ...
    def close(self) -> None: ...
