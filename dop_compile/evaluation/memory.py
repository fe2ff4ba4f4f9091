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
        self._status, self._reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
        if device.type == "cuda":
            self.what = "torch.cuda.max_memory_allocated"
        elif self._status.exists() and self._reset.exists():
            self.what = "peak resident set of the process"
        else:
            self.what = "not known on this system"

    def start(self) -> None:
        """Begin a new measurement."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self._reset.exists():
            self._reset.write_text(RESET_PEAK)

    def peak(self) -> int | None:
        """Bytes since `start`; None where it is not known."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if not self._status.exists() or not self._reset.exists():
            return None
        lines = dict(line.split(":", 1) for line in self._status.read_text().splitlines() if ":" in line)
        return 1024 * int(lines["VmHWM"].split()[0])
