"""Where the time of one answer goes, in milliseconds; the four parts add up to the whole `generate`.

    generate -> [vision] -> decoder -> [prefill] -> first token -> [decode] -> answer
                               |
                          [selection]

vision: all before the decoder: preparing the call, vision tower, projector, merging features into the prompt.
selection: choosing visual tokens, before the decoder or inside it (but for what PyramidDrop projects for it alone).
prefill: the decoder on the prompt, and the head on its last row.
decode: everything after the first forward pass.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dop_compile.spans import listening

__all__ = ["STAGES", "Clock"]

STAGES = ("vision", "selection", "prefill", "decode")


class Clock:
    """Times of one answer; on CUDA the device is waited for wherever a part ends."""

    def __init__(self, device: torch.device):
        self.milliseconds = dict.fromkeys(STAGES, 0.0)
        self._device = device
        self._stage = STAGES[0]
        self._before: list[str] = []
        self._since = 0.0

    @contextmanager
    def running(self) -> Iterator[Clock]:
        """The block is one `generate`."""
        self._since = self._now()
        with listening(self._span):
            yield self
        self._switch(self._stage)

    def enter_decoder(self) -> None:
        """The decoder is called; the first time, this is where prefill begins."""
        if self._stage == "vision":
            self._switch("prefill")

    def leave_model(self) -> None:
        """The model's forward returns; the first time, this is where prefill ends."""
        if self._stage == "prefill":
            self._switch("decode")

    def _span(self, name: str, begins: bool) -> None:
        if begins:
            self._before.append(self._stage)
            self._switch(name)
        else:
            self._switch(self._before.pop())

    def _switch(self, stage: str) -> None:
        now = self._now()
        self.milliseconds[self._stage] += 1000 * (now - self._since)
        self._stage, self._since = stage, now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
