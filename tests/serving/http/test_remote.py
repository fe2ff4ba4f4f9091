"""Pictures by address: from allowed origins alone."""

from __future__ import annotations

import asyncio
import io
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from dop_compile.serving.http.errors import ApiError
from dop_compile.serving.http.remote import RemoteImages, origin
from dop_compile.serving.http.settings import Limits
from tests.serving.served import NAME, as_request, ask, picture, post, serving
from tests.serving.words import WordEngine, answer


def file() -> bytes:
    content = io.BytesIO()
    picture().save(content, "PNG")
    return content.getvalue()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Host"]))  # type: ignore[attr-defined]
        if self.path.startswith("/to?"):
            self.send_response(302)
            self.send_header("Location", self.path.partition("?")[2])
            self.end_headers()
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x" * 65_536)
            except OSError:
                pass
        else:
            content = file()
            self.send_response(200 if self.path == "/photo.png" else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def other() -> Iterator[tuple[str, Any]]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", server
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(url: str, *origins: str, private: bool = True, limits: Limits | None = None) -> bytes:
    return asyncio.run(RemoteImages(origins, private, limits or Limits()).fetch(url, "here"))


def refused(url: str, *origins: str, **options: Any) -> str:
    with pytest.raises(ApiError) as failed:
        fetch(url, *origins, **options)
    assert 400 <= failed.value.status < 500
    return failed.value.message


def test_an_allowed_origin_is_fetched_from(other: tuple[str, Any]) -> None:
    base, server = other
    assert fetch(f"{base}/photo.png", base) == file()
    assert server.asked[-1] == ("/photo.png", base.removeprefix("http://"))


def test_nothing_is_fetched_unless_allowed(other: tuple[str, Any]) -> None:
    base, server = other
    before = len(server.asked)
    assert "send them as data URLs" in refused(f"{base}/photo.png")
    localhost = base.replace("127.0.0.1", "localhost")
    for allowed in ("https://example.org", base.replace("http", "https"), "http://127.0.0.1", localhost):
        assert "not fetched from there" in refused(f"{base}/photo.png", allowed)
    for url in (
        "file:///etc/passwd",
        "ftp://127.0.0.1/",
        "//x",
        "http://user@127.0.0.1/",
        "http://[",
        "http://a:99999/",
    ):
        assert "not an address" in refused(url, base)
    assert len(server.asked) == before


def test_addresses_that_are_not_public_are_not_connected_to(
    other: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, server = other
    before = len(server.asked)
    assert "not public" in refused(f"{base}/photo.png", base, private=False)

    def points_to(address: str) -> Any:
        def getaddrinfo(host: str, port: int, *_: Any, **__: Any) -> Any:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            return [(family, socket.SOCK_STREAM, 0, "", (address, port))]

        return getaddrinfo

    for address in (
        "10.0.0.1",
        "169.254.169.254",
        "::1",
        "::ffff:127.0.0.1",
        "fe80::1",
        "0.0.0.0",
        "100.64.0.1",
        "224.0.0.1",
    ):
        monkeypatch.setattr(socket, "getaddrinfo", points_to(address))
        assert "not public" in refused("https://example.org/a.png", "https://example.org", private=False)
    assert len(server.asked) == before


def test_the_way_leads_on_to_allowed_origins_alone(other: tuple[str, Any]) -> None:
    base, _server = other
    assert fetch(f"{base}/to?/photo.png", base) == file()
    assert "not fetched from there" in refused(f"{base}/to?http://localhost:1/photo.png", base)
    assert "could not be fetched" in refused(f"{base}/to?{base}/to?{base}/to?{base}/to?/photo.png", base)


def test_what_cannot_be_had_is_said(other: tuple[str, Any]) -> None:
    base, _ = other
    assert "could not be fetched" in refused(f"{base}/missing.png", base)
    assert "larger than 1000 bytes" in refused(f"{base}/endless", base, limits=Limits(image_bytes=1000))
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert "could not be fetched" in refused(f"http://127.0.0.1:{port}/", f"http://127.0.0.1:{port}")


def test_a_server_answers_about_a_fetched_picture(other: tuple[str, Any]) -> None:
    base, _ = other
    body = {"model": NAME, "messages": ask("Hi.", f"{base}/photo.png")}
    with serving(WordEngine(), image_origins=(base,), private_images=True) as served:
        found = post(served.url, body).json()
        assert found["choices"][0]["message"]["content"] == answer(as_request("Hi.", picture()), "100%")[0]
    with serving(WordEngine()) as served:
        error = post(served.url, body).json()["error"]
        assert error["param"] == "messages[0].content[0].image_url.url"


@pytest.mark.parametrize("text", ["example.org", "ftp://example.org", "https://", "https://me@example.org", ""])
def test_an_origin_has_scheme_and_host(text: str) -> None:
    with pytest.raises(ValueError, match="expected an address"):
        origin(text)
