"""The page at /, in a browser without a screen."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from dop_compile.serving.patches import PatchView
from tests.serving.browser import Browser
from tests.serving.served import Served, as_request, ask, picture, serving
from tests.serving.words import Prepared, WordEngine, answer

READ = ((0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5), (1, 4), ())
QUESTION = "What is in the picture?"
ASKED = "Number(document.body.dataset.asked)"


class ShowingEngine(WordEngine):
    def patches(self, prepared: Prepared) -> PatchView:
        return PatchView(((2, 3),), READ, cropped=False)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("needs the programs chromium and chromedriver")
    with Browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    picture().save(path)
    return path


def open_page(browser: Browser, served: Served) -> None:
    browser.open(served.url)
    browser.until("document.querySelector('#tier-name').textContent")


def test_a_picture_is_asked_about_and_its_patches_are_shown(browser: Browser, image: Path) -> None:
    with serving(ShowingEngine()) as served:
        open_page(browser, served)
        browser.type("#file", str(image))
        browser.click("#ask")
        browser.until(f"{ASKED} === 1")
        text, _, _ = answer(as_request(QUESTION, picture(), max_new_tokens=64), "100%")
        assert browser.text("#answer") == text
        assert browser.text("#times").startswith("tier 100%: first token after ")
        assert browser.text("#error") == ""
        figures = "[...document.querySelectorAll('#patches figure')]"
        assert browser.run(f"{figures}.map((figure) => figure.textContent)") == [
            "layers 0 to 1: 6 of 6",
            "layer 2: 2 of 6",
            "layer 3: 0 of 6",
        ]
        # Of layer 2 the middle column is read: its pixels are the picture's, the others are dark
        pixel = "({0}[1].querySelector('canvas').getContext('2d').getImageData({1}, 20, 1, 1).data)"
        seen = [browser.run(f"[...{pixel.format(figures, x)}]")[:3] for x in (20, 80, 140)]
        assert seen[1] == list(picture().getpixel((0, 0)))  # type: ignore[arg-type]
        assert max(seen[0]) < 60
        assert max(seen[2]) < 60
        assert browser.complaints() == []


def test_the_budget_moves(browser: Browser) -> None:
    with serving(ShowingEngine()) as served:
        open_page(browser, served)
        assert browser.text("#tier-name") == "100%"
        browser.type("#tier", "\ue014")  # the arrow to the right
        assert browser.text("#tier-name") == "28%"
        browser.click("#ask")
        browser.until(f"{ASKED} === 1")
        assert browser.text("#answer") == answer(as_request(QUESTION, max_new_tokens=64), "28%")[0]
        assert browser.run("document.querySelector('#patches-section').hidden")
        browser.click("#limited")
        browser.click("#ask")  # 100 ms: the engine's first tier
        browser.until(f"{ASKED} === 2")
        assert browser.text("#times").startswith("tier 100%")
        browser.run("document.querySelector('#ms').value = 20")
        browser.click("#ask")
        browser.until(f"{ASKED} === 3")
        assert browser.text("#times").startswith("tier 28%")


def test_a_request_can_be_stopped(browser: Browser) -> None:
    engine = ShowingEngine(gate=threading.Event())
    with serving(engine) as served:
        open_page(browser, served)
        browser.click("#ask")
        while not engine.running:
            pass
        browser.click("#stop")
        browser.until(f"{ASKED} === 1")
        engine.gate.set()  # type: ignore[union-attr]
        assert browser.text("#error") == ""
        while engine.running:
            pass
        assert engine.cancelled == [1]


def test_a_key_is_asked_for_and_errors_are_shown(browser: Browser) -> None:
    with serving(ShowingEngine(), api_key="open sesame") as served:
        browser.open(served.url)
        browser.until("!document.querySelector('#key-field').hidden")
        browser.type("#key", "wrong\ue004")  # and to the next field
        assert "API key" in browser.until("document.querySelector('#error').textContent")
        browser.run("document.querySelector('#key').value = ''")
        browser.type("#key", "open sesame\ue004")
        browser.until("document.querySelector('#tier-name').textContent")
        assert browser.text("#error") == ""
        browser.run("document.querySelector('#tokens').value = 4000")
        browser.click("#ask")
        browser.until(f"{ASKED} === 1")
        assert "expected at most 1024" in browser.text("#error")


def test_patches_are_asked_for_like_text() -> None:
    body = {"model": "words@28%", "messages": ask("Hi.")}
    with serving(ShowingEngine()) as served:
        found = httpx.post(f"{served.url}/v1/chat/patches", json=body).json()
        assert found == {"tier": "28%", "grids": [[2, 3]], "read": [list(tokens) for tokens in READ], "cropped": False}
    with serving(WordEngine()) as served:
        refused = httpx.post(f"{served.url}/v1/chat/patches", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "not_supported")


def test_the_page_loads_nothing_from_elsewhere() -> None:
    with serving(WordEngine()) as served:
        for path in ("/", "/page.js", "/page.css"):
            response = httpx.get(f"{served.url}{path}")
            assert "default-src 'none'" in response.headers["content-security-policy"]
            assert "//" not in response.text.replace("// ", "")  # no address with a host
            assert "onclick" not in response.text
