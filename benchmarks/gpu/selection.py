"""How long reducers choose among 576 to 16,384 visual tokens, and the memory that they need for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import synchronise
from reducers import contexts

from dop_compile.reducers import create, known, select_batch
from gpu.setting import Setting
from gpu.timing import measure

__all__ = ["selection"]

HIDDEN = 1024
KEPT = 6
"""One of so many tokens is kept, as in the published 28 % policies."""


def selection(setting: Setting) -> None:
    """Batch 1; at most three rounds of each, since the greedy choices of many tokens take long."""
    names = [name for name in known() if name not in ("given", "resize")]
    for tokens in (36, 72) if setting.tiny else (576, 2880, 5760, 16384):
        samples = contexts(HIDDEN, tokens, 1, setting.device, setting.dtype)
        calls = {name: _choice(name, samples, tokens // KEPT) for name in names}
        print(f"reducers, {tokens} tokens", flush=True)
        rows = measure(calls, 3, setting.device, setting.clock, base="uniform", least_rounds=1)
        for row in rows:
            row.pop("ratio", None)  # to nothing that means something
            row.pop("quartiles", None)
            if "error" not in row and setting.clock.left > 0:
                row["peak_mib"] = _peak_mib(calls[row["name"]], setting.device)
        setting.store.add("reducers", f"{tokens // KEPT} of {tokens} tokens", rows)


def _choice(name: str, samples: list[Any], count: int) -> Callable[[], Any]:
    reducer = create(name)
    return lambda: select_batch(reducer, samples, [count] * len(samples))


def _peak_mib(call: Callable[[], Any], device: torch.device) -> float | None:
    """MiB that one call needs at most above what is allocated already."""
    if device.type != "cuda":
        return None
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with torch.no_grad():
        call()
    synchronise(device)
    return float(torch.cuda.max_memory_allocated(device) - before) / 2**20
