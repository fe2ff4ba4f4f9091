"""What a server asks of an engine, and what it is told: no torch, no HTTP.

prepare(request) -> Prepared        any thread
admit(prepared) -> id               the engine's thread, from here on
step() -> events of some or all of the running requests; the one with a finish reason is a request's last
cancel(id)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Engine", "Event", "Prepared", "Request", "RequestError"]


class RequestError(ValueError):
    """A request that cannot be answered as it is; the message is for the client."""


@dataclass(frozen=True)
class Request:
    """The next message of a conversation is asked for.

    Args:
        messages: {"role", "content"}, where the content is a text or a list of parts: {"type": "text", "text"} and
            {"type": "image", "image"}, a PIL image in RGB.
        tier: name; None: `max_ms` chooses, or else it is the engine's first.
        max_ms: milliseconds to the first token; the tier of the most operations that is predicted to keep to it.
        max_new_tokens: of the answer.
        temperature: 0 takes the likeliest token; else logits are divided by it, and tokens drawn.
        top_p: draw from the fewest tokens that together have this probability; 1: from all.
        top_k: draw from this many tokens; 0: from all.
        seed: of the draws; None: others each time.
        stop: texts that end the answer, and are not part of it.
    """

    messages: Sequence[Mapping[str, Any]]
    tier: str | None
    max_ms: float | None
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: tuple[str, ...]


class Prepared(Protocol):
    """A request that was read; what else it holds is its engine's."""

    @property
    def prompt_tokens(self) -> int:
        """Of the prompt, visual ones included, before reduction."""
        ...

    @property
    def tier(self) -> str:
        """That will answer."""
        ...


@dataclass(frozen=True)
class Event:
    """Something that happened to a running request.

    Args:
        id: as `admit` returned it.
        text: what is added to the answer; may be "".
        tokens: number of tokens that it took.
        finish: "stop" or "length" of a request's last event; None before.
    """

    id: int
    text: str
    tokens: int
    finish: str | None


class Engine(Protocol):
    """Answers several requests at a time. Used on one thread, but for `prepare`."""

    @property
    def tiers(self) -> tuple[str, ...]:
        """Names, the default first."""
        ...

    @property
    def context_length(self) -> int:
        """Tokens of a prompt and its answer together, at most."""
        ...

    @property
    def max_batch(self) -> int:
        """Requests that run at once, at most."""
        ...

    @property
    def running(self) -> int:
        """Requests that were admitted and have not ended."""
        ...

    def prepare(self, request: Request) -> Prepared:
        """Read a request; from any thread.

        Raises:
            RequestError: it cannot be answered.
        """
        ...

    def admit(self, prepared: Any) -> int:
        """Begin an answer, where `running` is below `max_batch`; returns its id.

        Raises:
            RequestError: it cannot be answered after all.
        """
        ...

    def step(self) -> list[Event]:
        """Go on with the running requests."""
        ...

    def cancel(self, id: int) -> None:
        """Let go of a request; of one that has ended, nothing happens."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...
