"""Tests marked `conformance` run with `-m conformance` alone: they take minutes, and prove what shorter ones sample."""

from __future__ import annotations

import pytest
from PIL import ImageFile


def pytest_runtest_setup() -> None:
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # importing lmms-eval sets it


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name.startswith("onnx_"):  # by one worker, so that each model is exported once
            item.add_marker(pytest.mark.xdist_group("onnx"))
    if "conformance" in (config.option.markexpr or ""):
        return
    left_out = [item for item in items if item.get_closest_marker("conformance")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("conformance")]
