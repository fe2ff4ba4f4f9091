"""What the suite prints last is what its tests found, also where several processes ran them."""

from __future__ import annotations

from types import SimpleNamespace

from tests import conftest
from tests.conformance.summary import pytest_terminal_summary


class _Terminal:
    def __init__(self, **outcomes: list[str]):
        at = "tests/conformance/test_families.py::test_"
        self.stats = {
            kind: [SimpleNamespace(nodeid=at + name, when="call") for name in names] for kind, names in outcomes.items()
        }
        self.lines: list[str] = []
        self.section = self.lines.append
        self.write_line = self.lines.append


def test_a_family_is_what_its_worst_test_says() -> None:
    terminal = _Terminal(
        passed=["full[llava-sdpa]", "full[qwen-sdpa]", "row[qwen]", "a_refused_family_is_refused[mamba]", "no_family"],
        failed=["row[llava]", "a_refused_family_is_refused[jamba]"],
    )
    pytest_terminal_summary(terminal)
    assert terminal.lines == [
        "families",
        "WRONG    llava",
        "exact    qwen",
        "refused  mamba",
        "WRONG    jamba",
        "2 WRONG, 1 exact, 1 refused",
    ]


def test_other_runs_print_nothing() -> None:
    terminal = _Terminal()
    pytest_terminal_summary(terminal)
    assert not terminal.lines


def test_the_process_that_prints_has_it() -> None:
    """It reads `tests/conftest.py`, and no conftest below."""
    assert conftest.pytest_terminal_summary is pytest_terminal_summary
