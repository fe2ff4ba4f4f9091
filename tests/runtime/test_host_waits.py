"""Runs `host_waits.py` in a process of its own: a device that torch has been told of stays for the whole process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_host_waits() -> None:
    file = Path(__file__).with_name("host_waits.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, cwd=file.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
