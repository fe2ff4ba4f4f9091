"""The command line in-process."""

from __future__ import annotations

import pytest

from dop_compile.cli import main


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    code = main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a refused command leaves on stderr."""
    code, out, err = run(capsys, *argv)
    # Progress bars end in carriage returns
    lines = [line for line in err.replace("\r", "\n").split("\n") if line.startswith("dop-compile ")]
    assert (code, out, len(lines)) == (2, "", 1)
    assert "Traceback" not in err
    return lines[0]
