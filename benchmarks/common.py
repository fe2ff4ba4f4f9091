"""What the benchmarks share: interleaved timing, and a description of the machine."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import dop_compile as package
from dop_compile.timing import rounds as interleaved
from dop_compile.timing.rounds import synchronise

__all__ = ["environment", "interleave", "synchronise"]


def interleave(contenders: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each contender in each round."""
    timed = {name: functools.partial(interleaved.milliseconds, call, device) for name, call in contenders.items()}
    with torch.inference_mode():
        return interleaved.interleave(timed, rounds)


def environment(device: torch.device) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    commit = os.environ.get("COMMIT", "")  # for a copy whose git knows less
    if not commit and shutil.which("git"):
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    commit = commit or "unknown"
    return {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dop_compile": f"{package.__version__} ({commit})",
        "command": " ".join(["python", *sys.argv]),
    }
