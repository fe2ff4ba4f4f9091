"""What a client sends to /v1/chat/completions: OpenAI's fields, and which of them this server knows.

1. Known and used: the fields of `ChatRequest`. `top_k` and `max_ms` are additions to OpenAI's.
2. Known and without effect: `user`, and a picture's `detail` (the model's own processor decides on sizes).
3. Accepted in the one value that asks for nothing: `NEUTRAL`. (refused) Any other value of these, since it would
   silently do nothing, and every field that is not known at all.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from dop_compile.serving.http.errors import ApiError, invalid
from dop_compile.serving.http.settings import Limits

__all__ = ["ChatRequest", "ImagePart", "Message", "TextPart", "read_chat"]

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": ({},),
}
"""Values of OpenAI's fields that ask for nothing; null is one of them for each."""

INT64 = 1 << 63
LONGEST = 200
"""Characters of a message that may hold what was sent, and of the name of a field."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class TextPart(_Strict):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """Where a picture is: in the URL itself (`data:`), or elsewhere."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Strict):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[Part], Field(min_length=1), Tag("parts")],
    Discriminator(lambda value: "parts" if isinstance(value, list) else "text"),
]


class Message(_Strict):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class StreamOptions(_Strict):
    """Of an answer that comes in pieces."""

    include_usage: bool = False


class ChatRequest(_Strict):
    """A request for the next message of a conversation."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=1, lt=INT64)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_ms: float | None = Field(None, gt=0, allow_inf_nan=False)
    user: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


def read_chat(body: dict[str, Any], limits: Limits) -> ChatRequest:
    """A request, checked against the fields and limits.

    Raises:
        ApiError: it is wrong; names the field.
    """
    known = {name: value for name, value in body.items() if not _asks_nothing(name, value)}
    for name in known:
        if name in NEUTRAL:
            raise invalid(f"{name}: this server does not do that; leave it out", name, "unsupported_parameter")
    try:
        chat = ChatRequest.model_validate(known)
    except ValidationError as error:
        raise _first(error) from None
    _check_limits(chat, limits)
    return chat


def _asks_nothing(name: str, value: Any) -> bool:
    if name not in NEUTRAL:
        return False
    return value is None or any(value == neutral and type(value) is type(neutral) for neutral in NEUTRAL[name])


def _check_limits(chat: ChatRequest, limits: Limits) -> None:
    if len(chat.messages) > limits.messages:
        raise invalid(f"messages: expected at most {limits.messages}, got {len(chat.messages)}", "messages")
    if chat.max_tokens is not None and chat.max_completion_tokens is not None:
        raise invalid("give max_completion_tokens or max_tokens, not both", "max_tokens")
    for name in ("max_tokens", "max_completion_tokens"):
        asked = getattr(chat, name)
        if asked is not None and asked > limits.new_tokens:
            raise invalid(f"{name}: expected at most {limits.new_tokens}, got {asked}", name)
    if len(chat.stops) > limits.stops:
        raise invalid(f"stop: expected at most {limits.stops} strings, got {len(chat.stops)}", "stop")
    if any(not 0 < len(stop) <= limits.stop_length for stop in chat.stops):
        raise invalid(f"stop: expected strings of 1 to {limits.stop_length} characters", "stop")
    if chat.stream_options is not None and not chat.stream:
        raise invalid("stream_options: they are of a stream; set stream", "stream_options")
    pictures = sum(
        isinstance(part, ImagePart)
        for message in chat.messages
        if not isinstance(message.content, str)
        for part in message.content
    )
    if pictures > limits.images:
        raise invalid(f"messages: expected at most {limits.images} images, got {pictures}", "messages")


def _first(error: ValidationError) -> ApiError:
    """The first thing that is wrong, without the value, which may be long."""
    found = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = _path(found["loc"])[:LONGEST]
    if found["type"] == "extra_forbidden":
        return invalid(f"{param}: no field of that name is known", param, "unknown_parameter")
    return invalid(f"{param}: {found['msg'][:LONGEST]}", param)


def _path(location: tuple[int | str, ...]) -> str:
    """As a client would write it: `messages[0].content[1].text`, without the tags of unions."""
    path = ""
    for number, step in enumerate(location):
        before = location[number - 1] if number else None
        if before == "content" or (isinstance(before, int) and location[number - 2] == "parts"):
            continue
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path
