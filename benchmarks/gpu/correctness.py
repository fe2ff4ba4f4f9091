"""The tests that want a GPU, before anything is timed: side by side, since each is mostly the host's work."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu.exported import note_providers
from gpu.setting import Setting

__all__ = ["correctness"]

ROOT = Path(__file__).parents[2]
CUDA = "tests/test_cuda.py"
GROUPS = {
    "nothing pruned": [CUDA, "-k", "bitwise"],
    "against the masked original": [CUDA, "-k", "masked"],
    "reducers, inductor, kernels": [
        CUDA,
        "tests/runtime/test_attention_kernels.py",
        "-k",
        "test_cuda and not bitwise and not masked or test_the_real_flash_attention",
    ],
}


def correctness(setting: Setting) -> None:
    """How each group ended, and every test that failed or was skipped."""
    note_providers(setting)
    chosen = {"reducers": [CUDA, "-k", "choose"]} if setting.tiny else GROUPS
    with tempfile.TemporaryDirectory() as folder:
        logs = {name: Path(folder) / f"{number}.log" for number, name in enumerate(chosen)}
        started = {name: _start(arguments, logs[name]) for name, arguments in chosen.items()}
        try:
            for name, process in started.items():
                try:
                    process.wait(timeout=max(1.0, setting.clock.left))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                text = logs[name].read_text()
                print(f"--- {name}\n{text[-6000:]}", flush=True)
                setting.store.note("correctness", **{name: _summary(process, text)})
        finally:
            for process in started.values():
                process.kill()


def _start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pytest", "-rfEs", "--tb=short", "-p", "no:cacheprovider", *arguments]
    with log.open("wb") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)


def _summary(process: subprocess.Popen[bytes], text: str) -> list[Any]:
    """Pytest's last line, and its lines of failed and skipped tests."""
    named = re.findall(r"^(?:FAILED|ERROR|SKIPPED) .*$", text, re.MULTILINE)
    ends = re.findall(r"^=*\s*(\d+ (?:passed|failed|skipped|deselected|error).*?)\s*=*$", text, re.MULTILINE)
    return [ends[-1] if ends else f"did not end by itself (exit code {process.returncode})", *named[:12]]
