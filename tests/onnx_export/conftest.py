"""Where the exports that tests share are kept."""

from __future__ import annotations

import os

import pytest

from tests.onnx_export import exported


@pytest.fixture(scope="session", autouse=True)
def exports_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "onnx_exports"
    folder.mkdir(exist_ok=True)
    exported.ROOT[:] = [folder]
