"""Clients that go, wait too long or are too many; servers that end."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from dop_compile.serving.http.gate import LOOPBACK
from dop_compile.serving.http.settings import Limits
from tests.serving.served import NAME, Served, as_request, ask, post, serving
from tests.serving.words import WordEngine, answer

BODY = {"model": NAME, "messages": ask("Go on.")}

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def send(served: Served, **more: Any) -> socket.socket:
    """A request whose answer nobody has read yet."""
    content = json.dumps({**BODY, **more}).encode()
    connection = socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])))
    connection.sendall(HEAD + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_takes_its_request_with_it(stream: bool) -> None:
    engine = WordEngine(seconds=0.02)
    with serving(engine) as served:
        connection = send(served, stream=stream)
        eventually(lambda: engine.running == 1)
        if stream:
            assert connection.recv(10)
        connection.close()
        eventually(lambda: engine.running == 0)
        assert engine.cancelled == [1]
        assert post(served.url, BODY).status_code == 200
        numbers = httpx.get(f"{served.url}/metrics").text
        assert 'dop_compile_requests_total{outcome="cancelled",tier="100%"} 1.0' in numbers


def test_a_client_that_goes_while_it_waits_is_never_begun() -> None:
    engine = WordEngine(max_batch=1, gate=threading.Event())
    with serving(engine) as served:
        first = send(served)
        eventually(lambda: engine.running == 1)
        second = send(served)
        eventually(lambda: served.server.scheduler.waiting == 1)
        second.close()
        engine.gate.set()  # type: ignore[union-attr]
        assert first.recv(12) == b"HTTP/1.1 200"
        eventually(lambda: served.server.scheduler.waiting == 0 and engine.running == 0)
        assert engine.admitted == 1


def test_a_full_queue_says_when_to_come_back() -> None:
    engine = WordEngine(max_batch=1, gate=threading.Event())
    with serving(engine, queue=2) as served:
        held = [send(served) for _ in range(3)]
        eventually(lambda: engine.running + served.server.scheduler.waiting == 3)
        refused = post(served.url, BODY)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["Retry-After"]) <= 60
        assert refused.json()["error"]["code"] == "queue_full"
        engine.gate.set()  # type: ignore[union-attr]
        for connection in held:
            assert connection.recv(12) == b"HTTP/1.1 200"
        assert post(served.url, BODY).status_code == 200


def test_waiting_and_running_have_their_time() -> None:
    engine = WordEngine(max_batch=1, seconds=0.05)
    with serving(engine, queue_seconds=0.05, request_seconds=0.2) as served:
        first = send(served)
        eventually(lambda: engine.running == 1)
        waited = post(served.url, BODY)
        assert (waited.status_code, waited.json()["error"]["code"]) == (503, "timeout")
        assert "Retry-After" in waited.headers
        assert first.recv(12) == b"HTTP/1.1 504"
        eventually(lambda: engine.running == 0)
        with httpx.stream("POST", f"{served.url}/v1/chat/completions", json={**BODY, "stream": True}) as response:
            lines = [line for line in response.iter_lines() if line]
        assert response.status_code == 200
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"


def test_an_end_finishes_what_runs_and_sends_away_what_waits() -> None:
    engine = WordEngine(max_batch=1, seconds=0.03)
    with serving(engine) as served:
        runs = send(served)
        eventually(lambda: engine.running == 1)
        waits = send(served)
        eventually(lambda: served.server.scheduler.waiting == 1)
        served.end()
        assert waits.recv(12) == b"HTTP/1.1 503"
        text = b""
        while part := runs.recv(4096):
            text += part
        assert text.startswith(b"HTTP/1.1 200")
        assert answer(as_request("Go on."), "100%")[0].encode() in text
        assert engine.closed
        assert len(engine.threads) == 1


def test_a_grace_that_is_over_ends_what_runs() -> None:
    engine = WordEngine(seconds=0.7)
    with serving(engine, grace=1) as served:
        connection = send(served)
        eventually(lambda: engine.running == 1)
        served.end()
        assert connection.recv(12) == b"HTTP/1.1 503"
        assert engine.closed
        assert engine.cancelled == [1]


def test_an_engine_that_fails_fails_its_requests_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    engine = WordEngine(broken=RuntimeError("about Go on."))
    with serving(engine) as served, caplog.at_level(logging.DEBUG):
        failed = post(served.url, BODY)
        assert (failed.status_code, failed.json()["error"]["type"]) == (500, "server_error")
        assert "Go on" not in failed.text
        engine.broken = None
        assert post(served.url, BODY).status_code == 200
        assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("dop_compile")]
    assert any("RuntimeError" in message and "words.py" in message for message in ours)
    assert not any("Go on" in message for message in ours)  # nothing of a request is logged


def test_an_engine_that_does_not_let_go_is_given_up() -> None:
    engine = WordEngine(broken=RuntimeError())
    engine.cancel = lambda id: (_ for _ in ()).throw(RuntimeError())  # type: ignore[method-assign,misc]
    with serving(engine) as served:
        assert post(served.url, BODY).status_code == 500
        eventually(lambda: httpx.get(f"{served.url}/health").status_code == 503)
        assert httpx.get(f"{served.url}/health").json() == {"status": "failed"}
        assert post(served.url, BODY).status_code == 503


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    with serving(WordEngine(), limits=Limits(body_seconds=0.1)) as served:
        connection = socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])))
        connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        assert connection.recv(12) == b"HTTP/1.1 408"


def test_a_body_that_is_too_long_is_not_read() -> None:
    with serving(WordEngine(), limits=Limits(body_bytes=1000)) as served:
        for content in (b"x" * 1001, b"x" * 10_000_000):
            headers = {"Content-Type": "application/json"}
            refused = httpx.post(f"{served.url}/v1/chat/completions", content=content, headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")
        connection = socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])))
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n3e8\r\n" + b" " * 1000 + b"\r\n1\r\n \r\n")
        assert connection.recv(12) == b"HTTP/1.1 413"


def test_those_that_are_still_read_take_room() -> None:
    with serving(WordEngine(max_batch=1), queue=1) as served:
        port = int(served.url.rpartition(":")[2])
        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        for connection in slow:
            connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        eventually(lambda: post(served.url, BODY).status_code == 429)
        slow[0].close()
        eventually(lambda: post(served.url, BODY).status_code == 200)
        slow[1].close()


def test_a_server_answers_to_its_own_names() -> None:
    with serving(WordEngine(), hosts=LOOPBACK | {"chat.example.org"}) as served:
        for host in ("localhost", "LOCALHOST:1", "127.0.0.1:80", "[::1]:8000", "chat.example.org", "chat.example.org."):
            assert post(served.url, BODY, headers={"Host": host}).status_code == 200, host
        for host in ("evil.example", "localhost.evil.example", "", "[::2]", "[", "127.0.0.2", "127.0.0.1.nip.io"):
            refused = post(served.url, BODY, headers={"Host": host})
            assert (refused.status_code, refused.json()["error"]["code"]) == (421, "unknown_host"), host


def test_small_pieces_are_sent_at_once() -> None:
    """A connection that waits for acknowledgements takes 40 ms for an answer of two pieces, each time."""
    with serving(WordEngine()) as served, httpx.Client() as client:
        times = []
        for _ in range(20):
            begun = time.perf_counter()
            assert client.get(f"{served.url}/health").status_code == 200
            times.append(time.perf_counter() - begun)
    assert sorted(times)[5] < 0.03


def test_what_is_counted() -> None:
    with serving(WordEngine()) as served:
        post(served.url, BODY)
        post(served.url, {**BODY, "model": f"{NAME}@28%", "max_tokens": 1})
        post(served.url, {**BODY, "model": "other"})
        numbers = httpx.get(f"{served.url}/metrics")
        assert numbers.headers["content-type"].startswith("text/plain; version=0.0.4")
        tokens = answer(as_request("Go on."), "100%")[2]
        for line in (
            'dop_compile_requests_total{outcome="stop",tier="100%"} 1.0',
            'dop_compile_requests_total{outcome="length",tier="28%"} 1.0',
            'dop_compile_prompt_tokens_total{tier="100%"} 2.0',
            f'dop_compile_generated_tokens_total{{tier="100%"}} {tokens}.0',
            'dop_compile_first_token_seconds_count{tier="100%"} 1.0',
            'dop_compile_refused_total{status="404"} 1.0',
            "dop_compile_running_requests 0.0",
        ):
            assert line in numbers.text.splitlines()
