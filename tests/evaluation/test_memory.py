"""Peak memory is that of what was done since the start, and of nothing before."""

from __future__ import annotations

import sys

import pytest
import torch

from dop_compile.evaluation.memory import PeakMemory

MEGABYTE = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_the_peak_on_the_cpu() -> None:
    memory = PeakMemory(torch.device("cpu"))
    assert "resident set" in memory.what

    def peak(size: int) -> int:
        memory.start()
        if size:
            torch.ones(size * MEGABYTE, dtype=torch.uint8)  # written to, and freed
        found = memory.peak()
        assert found is not None
        return found

    base = peak(0)
    assert 180 * MEGABYTE < peak(200) - base < 260 * MEGABYTE
    assert peak(0) - base < 100 * MEGABYTE
