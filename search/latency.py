"""Predict a policy's prefill time from measured ones, on the device that it will run on.

A decoder of L layers, with n visual tokens in it, takes D + d_Q Q(n) + d_K K(n) + d_P M(n) milliseconds, where the
visual tokens are queries in d_Q layers, keys and values in d_K and in the MLP in d_P. Q, K and M are the times of one
layer's modules, found as differences of whole prefills, so that they hold what calling the modules costs; D is the
prefill of everything that is not visual. Between the measured n they are linear.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dop_compile.checks import finite, integer
from dop_compile.compiler import dop_compile
from dop_compile.documents import Format, keep, kept, parse, write_atomic
from dop_compile.hf.fingerprint import model_fingerprint
from dop_compile.policy.policy import Policy
from dop_compile.replay import Replay

__all__ = ["LatencyModel", "measure_latency"]

FORMAT = Format("dop_compile.latency", (1, 2), "a file of measured latencies", "measure again")
"""Version 1 did not say of which model the latencies are."""
MODULES = ("query", "key_value", "mlp")
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class LatencyModel:
    """Milliseconds of one decoder prefill for one sample.

    Args:
        num_layers: of the decoder.
        tokens: visual tokens at which it was measured, ascending from 0.
        base: milliseconds without visual tokens.
        modules: per module ("query", "key_value", "mlp") the milliseconds that one layer takes at each of `tokens`.
        device, backend: where it was measured, in words.
        model_fingerprint: of the model; "" where it is not known (format version 1).
    """

    num_layers: int
    tokens: tuple[int, ...]
    base: float
    modules: Mapping[str, tuple[float, ...]]
    device: str
    backend: str
    model_fingerprint: str = ""

    def __post_init__(self) -> None:
        if len(self.tokens) < 2 or self.tokens[0] != 0 or list(self.tokens) != sorted(set(self.tokens)):
            raise ValueError(f"tokens: expected ascending counts from 0, got {self.tokens}")
        if set(self.modules) != set(MODULES):
            raise ValueError(f"modules: expected {', '.join(MODULES)}, got {', '.join(self.modules)}")
        for name, times in self.modules.items():
            if len(times) != len(self.tokens):
                raise ValueError(f"modules[{name!r}]: expected {len(self.tokens)} times, got {len(times)}")
            for value in (self.base, *times):
                finite(f"modules[{name!r}]", value)

    def __call__(self, query: Any, keys: Any, mlp: Any, n: Any) -> Array:
        """Milliseconds of policies that keep visual tokens in so many layers; arguments broadcast."""
        depths = zip((query, keys, mlp), MODULES, strict=True)
        total = self.base + sum(depth * np.interp(n, self.tokens, self._rising(name)) for depth, name in depths)
        return np.asarray(total, dtype=np.float64)

    def _rising(self, name: str) -> Array:
        """More tokens never take less: what looks like it is noise."""
        return np.maximum.accumulate(np.maximum(np.asarray(self.modules[name]), 0))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON to `path` atomically."""
        write_atomic(path, json.dumps(FORMAT.header() | dataclasses.asdict(self) | kept(self), indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyModel:
        """Read what `save` wrote; ValueError naming the file for anything else."""
        try:
            opened = FORMAT.open(parse(Path(path).read_text(encoding="utf-8")))
            document = opened.take(field.name for field in dataclasses.fields(cls))
            modules = {name: tuple(times) for name, times in document.pop("modules").items()}
            found = cls(**{**document, "tokens": tuple(document["tokens"])}, modules=modules)
            keep(found, opened)
            return found
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error


def measure_latency(
    model: Any,
    sample: Mapping[str, Any],
    *,
    tokens: Sequence[int] | None = None,
    rounds: int = 7,
    backend: str = "inductor",
) -> LatencyModel:
    """Time prefills of a model on its device; quiet machines give good models.

    Args:
        model: the untouched Hugging Face model.
        sample: a prompt of typical length, as its `forward` takes it.
        tokens: visual tokens to measure at; by default all, and 1/2 to 1/32 of them.
        rounds: of which medians are taken; all runs are interleaved.
        backend: the one that will be used, as in `dop_compile`.

    Raises:
        ValueError: the sample has no visual tokens.
    """
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    rounds = integer("rounds", rounds, low=1)
    replay = Replay(dop_compile(model, Policy.full(layers), backend=backend), sample)
    visual = replay.counts[1]
    if not visual:
        raise ValueError("sample: it has no visual tokens")
    chosen = tokens or [max(1, visual // 2**power) for power in range(6)]
    counts = sorted({integer("tokens", count, low=1, high=visual) for count in chosen})
    runs = {(0, "base"): Policy.full(layers).replace(visual_tokens=0)}
    for count in counts:
        runs[count, "all"] = Policy.full(layers).replace(visual_tokens=count)
        runs[count, "no mlp"] = Policy.depthwise(layers, mlp_depth=0, visual_tokens=count)
        runs[count, "keys"] = Policy.depthwise(layers, mlp_depth=0, mha_query_depth=0, visual_tokens=count)
    times: dict[Any, list[float]] = {key: [] for key in runs}
    for number in tqdm(range(rounds + 1), desc="timing", leave=False, file=sys.stderr):
        for key, policy in runs.items():
            taken = _milliseconds(replay, policy, model.device)
            if number:  # the first round compiles
                times[key].append(taken)
    median = {key: statistics.median(values) for key, values in times.items()}
    base = median[0, "base"]
    modules = {
        "query": [(median[n, "no mlp"] - median[n, "keys"]) / layers for n in counts],
        "key_value": [(median[n, "keys"] - base) / layers for n in counts],
        "mlp": [(median[n, "all"] - median[n, "no mlp"]) / layers for n in counts],
    }
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device)
    return LatencyModel(
        num_layers=layers,
        tokens=(0, *counts),
        base=base,
        modules={name: (0.0, *values) for name, values in modules.items()},
        device=device,
        backend=backend,
        model_fingerprint=model_fingerprint(model),
    )


def _milliseconds(replay: Replay, policy: Policy, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    replay.logits(policy)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - started)
