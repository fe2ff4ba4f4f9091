"""What is JSON for the server, and what is a request."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from dop_compile.serving.http.body import parse_json
from dop_compile.serving.http.errors import ApiError
from dop_compile.serving.http.settings import Limits
from dop_compile.serving.http.wire import read_chat
from tests.serving.served import ask

LIMITS = Limits()


def refused(body: bytes) -> str:
    with pytest.raises(ApiError) as failed:
        parse_json(body, LIMITS)
    assert failed.value.status == 400
    return failed.value.message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"[]", "expected a JSON object"),
        (b"{", "not JSON"),
        (b'{"a": NaN}', "NaN is not a number in JSON"),
        (b'{"a": -Infinity}', "-Infinity is not a number in JSON"),
        (b'{"a": 1, "a": 2}', "a name stands twice"),
        (b'{"a": "\xff"}', "not valid Unicode"),
        (b'{"a": "\\ud800"}', "not valid Unicode"),
        (b'{"a": [{"\\udc00": 1}]}', "not valid Unicode"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
    ],
)
def test_what_is_no_sound_json_is_refused(body: bytes, message: str) -> None:
    assert message in refused(body)


def test_depth_is_counted_outside_of_strings() -> None:
    def nested(depth: int) -> bytes:
        return b'{"a":' * depth + b"1" + b"}" * depth

    assert parse_json(nested(LIMITS.json_depth), LIMITS)
    assert "nested deeper than 16" in refused(nested(LIMITS.json_depth + 1))
    text = '[{"\\"[[' * 100
    assert parse_json(json.dumps({"a": text, text: [text] * 100}).encode(), LIMITS)["a"] == text


@pytest.mark.parametrize(
    "body", [b"[" * 2_000_000, b'"' * 2_000_001, b'"' + b"\\" * 2_000_001, b'{"a":"' + b"x" * 2_000_000]
)
def test_depth_is_counted_in_linear_time(body: bytes) -> None:
    begun = time.perf_counter()
    assert refused(body)
    assert time.perf_counter() - begun < 3  # a second power of two million would not end


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": ask("Hi."), **fields}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": ask("Hi.") * 257}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": ask("Hi.", 3)}, "messages[0].content[0].image_url.url"),
        ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages[0].name"),
        ({"messages": ask("Hi.", *["data:"] * 9)}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1025}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "3"}, "max_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_ms": 0}, "max_ms"),
        ({"logprobs": 0}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_the_field_that_is_wrong_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as failed:
        read_chat(chat(**fields), LIMITS)
    assert failed.value.param == param
    assert param.partition("[")[0] in failed.value.message


def test_values_that_ask_for_nothing_are_taken() -> None:
    neutral = {"n": 1, "logprobs": False, "tools": [], "tool_choice": None, "presence_penalty": 0.0, "logit_bias": {}}
    found = read_chat(chat(**neutral, stop=None, max_tokens=None, temperature=1), LIMITS)
    assert (found.stops, found.temperature) == ((), 1.0)
