"""A stream of random numbers for each batch that is sampled: PyTorch has one for the whole process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["Draws"]


class Draws:
    """Random numbers of one batch, on the CPU and on its device.

    Args:
        seed: None: other numbers each time.
    """

    def __init__(self, device: torch.device, seed: int | None):
        self._devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(self._devices):
            if seed is None:
                torch.seed()
            else:
                torch.manual_seed(seed)
            self._states = self._current()

    @contextmanager
    def used(self) -> Iterator[None]:
        """While the block runs, PyTorch draws from here, and afterwards from where it did before."""
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._states[0])
            for device, state in zip(self._devices, self._states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
            self._states = self._current()

    def _current(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]
