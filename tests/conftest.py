"""Tests marked `conformance` run with `-m conformance` alone: they take minutes, and prove what shorter ones sample."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from hypothesis import settings
from PIL import ImageFile

# Here, since the process that prints does not collect tests where several run them
from tests.conformance.summary import pytest_terminal_summary
from tests.drawing import FUZZ, register_profiles, same_constants, seed

__all__ = ["pytest_terminal_summary"]

register_profiles()


@pytest.hookimpl(trylast=True)
def pytest_configure() -> None:
    if settings.get_current_profile_name() != FUZZ:  # Hypothesis has loaded what the command line says
        same_constants()


def pytest_collection_finish() -> None:
    """Graphs are many small objects: a tenth of the time would be spent on looking for cycles among them."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    seed()  # before the fixtures, of which any may draw
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # importing lmms-eval sets it


@pytest.fixture
def no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PyTorch with CUDA makes no stream without a GPU, which offloaded caches ask for as soon as they are made."""
    monkeypatch.setattr(torch, "Stream", lambda: None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests in one worker, where they share models; all of ONNX in one, where each is exported once."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return "onnx" if nodeid.startswith("tests/onnx_") else nodeid.partition("::")[0]

    return Scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "conformance" in (config.option.markexpr or ""):
        return
    left_out = [item for item in items if item.get_closest_marker("conformance")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("conformance")]
