"""What a server is told once: who may use it, and how much of it one request may take."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Limits", "Settings"]


@dataclass(frozen=True)
class Limits:
    """Of one request; whatever is above is refused before it is worked on.

    Args:
        body_bytes: of the whole request, pictures in their base64 form included.
        body_seconds: until the whole body has come.
        json_depth: lists and objects inside each other.
        messages, images: in one request.
        image_bytes: of one picture's file.
        pixels: of all its pictures together; each is looked at before it is decoded.
        side: of a picture, its longer side, in pixels.
        aspect: its longer side by its shorter one. Processors scale the shorter side up to a fixed size, so that a long
            strip of few pixels can become a picture of many.
        new_tokens: generated at most.
        stops, stop_length: stop strings, and characters of one.
    """

    body_bytes: int = 20 << 20
    body_seconds: float = 30.0
    json_depth: int = 16
    messages: int = 256
    images: int = 8
    image_bytes: int = 10 << 20
    pixels: int = 16_000_000
    side: int = 16_384
    aspect: float = 50.0
    new_tokens: int = 1024
    stops: int = 4
    stop_length: int = 256


@dataclass(frozen=True)
class Settings:
    """Of one server.

    Args:
        name: the model's, which ids are made of: `name`, `name@28%`.
        limits: of one request.
        api_key: what clients have to send as a bearer token; None: nothing.
        hosts: names by which the server may be addressed (`Host`); None: any. It keeps pages of other sites from
            reading answers by a name that they let point to this machine.
        image_origins: where pictures may be fetched from, such as `https://example.org`; nothing else is fetched.
        private_images: whether these may have addresses that are not public.
        queue: requests that wait at most, besides those that run.
        queue_seconds, request_seconds: until a request has to be running, and until it has to be finished.
        new_tokens: generated unless the request says how many.
        max_ms: of requests for the automatic model that say none; None: the first tier answers these.
    """

    name: str
    limits: Limits = field(default_factory=Limits)
    api_key: str | None = None
    hosts: frozenset[str] | None = None
    image_origins: tuple[str, ...] = ()
    private_images: bool = False
    queue: int = 64
    queue_seconds: float = 60.0
    request_seconds: float = 600.0
    new_tokens: int = 256
    max_ms: float | None = None
