"""The page at /, in a browser without a screen."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dop_compile.serving.patches import PatchView
from dop_compile.serving.requests import RequestError
from tests.serving.served import Served, as_request, picture, serving
from tests.serving.words import Prepared, WordEngine, answer
from tests.serving.browser import Browser

READ = ((0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5), (1, 4), ())


class ShowingEngine(WordEngine):
    def patches(self, prepared: Prepared) -> PatchView:
        if isinstance(prepared.request.messages[0]["content"], str):
            raise RequestError("there is no picture")
        return PatchView(((2, 3),), READ, cropped=False)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(ShowingEngine()) as found:
        yield found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("needs the programs chromium and chromedriver")
    with Browser(tmp_path_factory.mktemp("browser")) as found:
        yield found
