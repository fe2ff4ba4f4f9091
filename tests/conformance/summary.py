"""A line per family at the end of a run of the suite."""

from __future__ import annotations

from typing import Any

__all__ = ["pytest_terminal_summary"]

_WORDS = {"passed": "exact", "failed": "WRONG", "error": "ERROR"}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    outcomes: dict[str, set[str]] = {}
    for kind, word in _WORDS.items():
        for report in terminalreporter.stats.get(kind, []):
            path, _, parameters = report.nodeid.partition("[")
            if not parameters or "conformance/test_families.py" not in path or report.when != "call":
                continue
            refused = "refused" in path.rpartition("::")[2]
            name = parameters.rstrip("]").split("-")[0]
            outcomes.setdefault(name, set()).add("refused" if refused and word == "exact" else word)
    if not outcomes:
        return
    terminalreporter.section("families")
    counts: dict[str, int] = {}
    for name, words in outcomes.items():
        worst = next(word for word in ("WRONG", "ERROR", "refused", "exact") if word in words)
        counts[worst] = counts.get(worst, 0) + 1
        terminalreporter.write_line(f"{worst:8} {name}")
    terminalreporter.write_line(", ".join(f"{count} {word}" for word, count in sorted(counts.items())))
