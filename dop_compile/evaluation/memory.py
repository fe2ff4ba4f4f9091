"""The most memory that one answer needed, weights included."""

from __future__ import annotations

from pathlib import Path

import torch

__all__ = ["PeakMemory"]

RESET_PEAK = "5"
"""What Linux takes in `clear_refs` to set the high-water mark back to the present resident set."""


class PeakMemory:
    """Bytes on one device.

    CUDA: `torch.cuda.max_memory_allocated`, what tensors took. Elsewhere: the high-water mark of the process's resident
    set on Linux, in which memory that was freed before may still be counted; on other systems it is not known.

    `what` says which in words.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._known = device.type == "cuda" or _reset_peak()
        self.what = "not known on this system"
        if self._known:
            on_cuda = device.type == "cuda"
            self.what = "torch.cuda.max_memory_allocated" if on_cuda else "peak resident set of the process"

    def start(self) -> None:
        """Begin a new measurement."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self._known:
            _reset_peak()

    def peak(self) -> int | None:
        """Bytes since `start`; None where it is not known."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if not self._known:
            return None
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        return 1024 * int(lines["VmHWM"].split()[0])


def _reset_peak() -> bool:
    """Whether the system let the high-water mark be set back."""
    try:
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    except OSError:
        return False
    return True
