"""Headless Chromium by the WebDriver protocol (https://www.w3.org/TR/webdriver2/), as far as the page needs it."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The name that the protocol gives to references to elements."""


class Browser:
    """One window, with a profile of its own in a folder."""

    def __init__(self, folder: Path):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._driver = subprocess.Popen(
            ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
        self._folder = folder

    def __enter__(self) -> Browser:
        end = time.monotonic() + 20
        while True:
            try:
                self._client.get("/status")
                break
            except httpx.TransportError:
                assert time.monotonic() < end
                time.sleep(0.05)
        options = {"args": [*FLAGS, f"--user-data-dir={self._folder}"]}
        wanted = {
            "capabilities": {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        }
        self._session = f"/session/{self._post('/session', wanted)['sessionId']}"
        return self

    def __exit__(self, *_: object) -> None:
        self._client.delete(self._session)
        self._driver.terminate()
        self._driver.wait(20)
        self._client.close()

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        response = self._client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()["value"]

    def open(self, url: str) -> None:
        self._post(f"{self._session}/url", {"url": url})

    def run(self, script: str) -> Any:
        """The value of an expression."""
        return self._post(f"{self._session}/execute/sync", {"script": f"return {script}", "args": []})

    def until(self, script: str) -> Any:
        """Wait until an expression is true; returns its value."""
        end = time.monotonic() + 20
        while not (value := self.run(script)):
            assert time.monotonic() < end, script
            time.sleep(0.02)
        return value

    def type(self, selector: str, text: str) -> None:
        """As a user does; into a file's field, its path."""
        self._post(f"{self._session}/element/{self._element(selector)}/value", {"text": text})

    def click(self, selector: str) -> None:
        self._post(f"{self._session}/element/{self._element(selector)}/click", {})

    def text(self, selector: str) -> str:
        return str(self.run(f"document.querySelector('{selector}').textContent"))

    def complaints(self) -> list[str]:
        """What the console says is wrong, such as content that the policy blocks."""
        entries = self._post(f"{self._session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def _element(self, selector: str) -> str:
        found = self._post(f"{self._session}/element", {"using": "css selector", "value": selector})
        return str(found[ELEMENT])
