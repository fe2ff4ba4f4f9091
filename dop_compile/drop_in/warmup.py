"""First calls ahead of time: what a model compiles and traces on them is then there.

A warm-up generates three tokens for each tier, batch size, text length, and padded or not: a prefill and two steps.
Sizes are dynamic in what is compiled, and so most of these calls compile nothing; the record says which did.
"""

from __future__ import annotations

import copy
import random
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch._dynamo.utils import counters
from tqdm import tqdm

from dop_compile.checks import integer
from dop_compile.drop_in.warm_prompts import Inputs, WarmPrompt, made_prompt
from dop_compile.hf.model_path import placeholder_ids

__all__ = ["Warmed", "Warmup", "warm_up"]

TEXT_LENGTH = 32
NEW_TOKENS = 3
"""The prefill gives the first; the second step is as all that follow."""


@dataclass(frozen=True)
class Warmed:
    """One kind of call that has been made.

    Args:
        tier: that it ran.
        batch_size: its rows.
        tokens: columns of its prompt, before reduction.
        padded: whether a row was shorter than the others.
        seconds: that it took, a prefill and two generated tokens.
        programs: decoders that were traced, or rewritten from a trace, for it.
        compilations: graphs that torch.compile compiled, or took from its cache, for it.
    """

    tier: str
    batch_size: int
    tokens: int
    padded: bool
    seconds: float
    programs: int
    compilations: int


@dataclass(frozen=True)
class Warmup:
    """What a warm-up did; `print` it for a table."""

    calls: tuple[Warmed, ...]

    @property
    def seconds(self) -> float:
        return sum(call.seconds for call in self.calls)

    @property
    def compilations(self) -> int:
        return sum(call.compilations for call in self.calls)

    def __str__(self) -> str:
        width = max(len("tier"), *(len(call.tier) for call in self.calls))
        lines = [f"{'tier':<{width}}  batch  tokens  padded  programs  compiled  seconds"]
        lines += [
            f"{call.tier:<{width}}  {call.batch_size:5}  {call.tokens:6}  {'yes' if call.padded else 'no':>6}  "
            f"{call.programs:8}  {call.compilations:8}  {call.seconds:7.2f}"
            for call in self.calls
        ]
        return "\n".join([*lines, f"{len(self.calls)} kinds of calls warmed in {self.seconds:.1f} s"])


def warm_up(
    view: Any,
    state: Any,
    batch_sizes: Sequence[int],
    text_lengths: Sequence[int] | None,
    tiers: Sequence[str] | None,
    padded: bool,
    inputs: Inputs | Sequence[Inputs] | None,
    progress: bool,
) -> Warmup:
    """Make the first calls of a compiled model; the arguments are those of `CompiledModel.warmup`.

    Args:
        view: the compiled model.
        state: its `CompiledState`.
    """
    rows = _numbers("batch_sizes", batch_sizes)
    lengths = None if text_lengths is None else _numbers("text_lengths", text_lengths)
    names = list(state.tiers) if tiers is None else [state.check_tier(name) for name in _tier_names(tiers)]
    prompts = _prompts(view, lengths, inputs)
    kinds = [
        (tier, prompt, size, pads)
        for tier in names
        for size in rows
        for prompt in prompts
        for pads in ((False, True) if padded else (False,))
    ]
    model = view.tier(view.dop_tier)  # of its own settings
    model.generation_config = _settings(view.generation_config)
    done = []
    with _random_state(view.device), tqdm(kinds, "warming", disable=not progress, leave=False, file=sys.stderr) as bar:
        for tier, prompt, size, pads in bar:
            bar.set_postfix_str(f"{tier}, batch {size}{', padded' if pads else ''}")
            done.append(_warm(model, state, tier, prompt.batch(size, padded=pads), pads))
    return Warmup(tuple(done))


def _warm(model: Any, state: Any, tier: str, batch: dict[str, Any], padded: bool) -> Warmed:
    if state.tiers[tier].reducer != "given":
        batch.pop("visual_indices", None)
    size, tokens = batch["input_ids"].shape
    programs, graphs = len(state.programs), counters["stats"]["unique_graphs"]
    started = time.perf_counter()
    for _ in range(1 if state.graphs is None else 2):  # what comes a second time is captured
        model.generate(**batch, tier=tier)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    seconds = time.perf_counter() - started
    return Warmed(
        *(tier, size, tokens, padded, seconds),
        programs=len(state.programs) - programs,
        compilations=counters["stats"]["unique_graphs"] - graphs,
    )


def _prompts(view: Any, lengths: list[int] | None, inputs: Inputs | Sequence[Inputs] | None) -> list[WarmPrompt]:
    if inputs is None:
        return [made_prompt(view, length) for length in lengths or [TEXT_LENGTH]]
    placeholders = placeholder_ids(view.config)
    given = [WarmPrompt(one, placeholders) for one in ([inputs] if isinstance(inputs, Mapping) else inputs)]
    if not given:
        raise ValueError("inputs: expected at least one prompt, got none")
    if lengths is None:
        return given
    return [prompt.lengthened(length) for prompt in given for length in lengths]


def _numbers(name: str, values: Iterable[int]) -> list[int]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected whole numbers such as (1, 4), got {values!r}")
    numbers = list(dict.fromkeys(integer(name, value, low=1) for value in values))
    if not numbers:
        raise ValueError(f"{name}: expected at least one number, got none")
    return numbers


def _tier_names(tiers: Sequence[str]) -> list[str]:
    if isinstance(tiers, str) or not isinstance(tiers, Iterable):
        raise TypeError(f"tiers: expected names of tiers in a list, got {tiers!r}")
    names = list(dict.fromkeys(tiers))
    if not names:
        raise ValueError("tiers: expected at least one name, got none; None warms all")
    return names


def _settings(settings: Any) -> Any:
    """How the model generates, for three tokens whatever these are."""
    settings = copy.deepcopy(settings)
    settings.max_new_tokens = settings.min_new_tokens = NEW_TOKENS
    settings.max_length = settings.max_time = settings.stop_strings = None
    return settings


@contextmanager
def _random_state(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, random numbers afterwards are those that would have come."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
