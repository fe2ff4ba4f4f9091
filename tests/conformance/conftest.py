"""The suite runs with `pytest -m conformance`."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Importing some eighty model classes takes seconds that other runs can do without."""
    wanted = "conformance" in (config.option.markexpr or "")
    return True if collection_path.name == "test_families.py" and not wanted else None
