"""What every benchmark needs: interleaved timing, and a description of the machine."""

from __future__ import annotations

import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

import dop_compile as package

__all__ = ["environment", "interleave", "synchronise"]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def interleave(contenders: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each contender in each round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    shuffle = random.Random(0)
    with torch.inference_mode():
        for name in tqdm(order, desc="warm up", leave=False):
            for _ in range(2):
                contenders[name]()
        for _ in tqdm(range(rounds), desc="rounds", leave=False):
            shuffle.shuffle(order)
            for name in order:
                synchronise(device)
                started = time.perf_counter()
                contenders[name]()
                synchronise(device)
                times[name].append(1000 * (time.perf_counter() - started))
    return times


def environment(device: torch.device) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dop_compile": f"{package.__version__} ({commit})",
        "command": " ".join(["python", *sys.argv]),
    }
