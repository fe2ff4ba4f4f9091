"""Time whole answers of the original and of every tier, phase by phase.

    result = bench(model, {"28%": policy}, inputs, batches=(1, 4), new_tokens=32)
    print(markdown(result))

A batch is the prompt that often, so that its rows have equal lengths. Every answer has the same number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dop_compile.checks import integer
from dop_compile.compiler import dop_compile
from dop_compile.evaluation.answers import GROUPS, Asker, prompt_counts
from dop_compile.evaluation.environment import environment
from dop_compile.hf.fingerprint import model_fingerprint
from dop_compile.hf.spellings import cache_of
from dop_compile.policy.policy import Policy
from dop_compile.reports.explain import TierCost, explain
from dop_compile.timing.result import AGAIN, FULL, ORIGINAL, Benchmark, Contender, Setting, Timing
from dop_compile.timing.rounds import interleave

__all__ = ["bench", "repeated"]

Inputs = Mapping[str, Any]


def repeated(inputs: Inputs, batch: int) -> dict[str, Any]:
    """The inputs of one row, `batch` times: every tensor along its first dimension."""
    return {name: torch.cat([value] * batch) if isinstance(value, Tensor) else value for name, value in inputs.items()}


@torch.no_grad()
def bench(
    model: Any,
    tiers: Mapping[str, Policy],
    inputs: Inputs,
    *,
    tier_inputs: Mapping[str, Inputs] | None = None,
    batches: Sequence[int] = (1,),
    backends: Sequence[str] = ("eager",),
    rounds: int = 7,
    new_tokens: int = 32,
) -> Benchmark:
    """Measure the original, the original again, the compiled model with nothing pruned, and every tier.

    Args:
        model: the untouched Hugging Face model, in eval mode.
        tiers: policies by name.
        inputs: what the model's `forward` takes for a prompt of one row; `token_groups` too, for a text-only model.
        tier_inputs: inputs of tiers that want others, such as smaller pictures.
        batches: batch sizes.
        backends: of `dop_compile`; the original runs as it is.
        rounds: how often each is measured.
        new_tokens: of every answer; 1 measures no decoding.

    Raises:
        TypeError, ValueError: no tiers, names that are taken, or numbers below 1.
    """
    if not tiers:
        raise ValueError("tiers: expected at least one policy, got none")
    if taken := sorted({ORIGINAL, AGAIN, FULL} & set(tiers)):
        raise ValueError(f"tiers: {taken[0]!r} is the name of what they are compared with; name the policy otherwise")
    rounds, new_tokens = integer("rounds", rounds, low=1), integer("new_tokens", new_tokens, low=1)
    batches = [integer("batches", batch, low=1) for batch in batches]
    policies: dict[str, Policy] = {FULL: Policy.full(next(iter(tiers.values())).num_layers), **tiers}
    own_inputs = {name: (tier_inputs or {}).get(name, inputs) for name in policies}
    settings: list[Setting] = []
    where: dict[str, Any] = {}
    counts = (0, 0, 0)
    for backend in backends:
        compiled = dop_compile(model, policies, backend=backend)
        asker = Asker(model, compiled, {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens})
        where = {**environment(model.device), "memory": asker.memory.what}
        counts = prompt_counts(compiled, inputs)
        costs = {name: _cost(compiled, name, prompt_counts(compiled, own)) for name, own in own_inputs.items()}
        # Policies for smaller pictures, too, are compared with the original's prompt, and written for it
        as_written = {name: _cost(compiled, name, counts) for name in policies}
        costs = {
            name: replace(cost, eq11_flops=as_written[name].eq11_flops, original_flops=as_written[name].original_flops)
            for name, cost in costs.items()
        }
        for batch in batches:
            rows = {name: repeated(own, batch) for name, own in own_inputs.items()}
            whole = repeated(inputs, batch)
            calls: dict[str, Callable[[], Timing]] = {
                ORIGINAL: _timed(asker, whole, None),
                AGAIN: _timed(asker, whole, None),
                **{name: _timed(asker, rows[name], policy) for name, policy in policies.items()},
            }
            timings = interleave(calls, rounds, progress=f"{backend}, batch {batch}")
            stored = {name: _kv_bytes(compiled, rows[name], tier=name) for name in policies}
            stored |= dict.fromkeys((ORIGINAL, AGAIN), _kv_bytes(model, _without_groups(whole)))
            contenders = tuple(
                Contender(name, tuple(timings[name]), stored[name], *_ratios(costs, name)) for name in calls
            )
            settings.append(Setting(backend, batch, contenders))
    return Benchmark(
        model=type(model).__name__,
        fingerprint=model_fingerprint(model),
        dtype=str(model.dtype).removeprefix("torch."),
        counts=counts,
        new_tokens=new_tokens,
        environment=where,
        settings=tuple(settings),
    )


def _timed(asker: Asker, inputs: Inputs, policy: Policy | None) -> Callable[[], Timing]:
    def call() -> Timing:
        answer = asker.ask(inputs, policy)
        return Timing(answer.vision_ms, answer.selection_ms, answer.prefill_ms, answer.decode_ms, answer.memory_bytes)

    return call


def _ratios(costs: Mapping[str, TierCost], name: str) -> tuple[float | None, float | None]:
    """Decoder FLOPs as written and as run, of the original's; nothing is left out of the original itself."""
    if name in costs:
        return costs[name].eq11_ratio, costs[name].executed_ratio
    return (None, None) if costs[FULL].eq11_ratio is None else (1.0, 1.0)


def _cost(compiled: Any, tier: str, counts: tuple[int, int, int]) -> TierCost:
    system, visual, text = counts
    return explain(compiled, tier, system=system, visual=visual, text=text).summary


def _without_groups(inputs: Inputs) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != GROUPS}


def _kv_bytes(model: Any, inputs: Inputs, **settings: Any) -> int:
    """What the cache holds after prefill."""
    output = model.generate(
        **inputs, **settings, max_new_tokens=1, do_sample=False, num_beams=1, return_dict_in_generate=True
    )
    return sum(
        tensor.nbytes
        for layer in cache_of(output).layers
        for tensor in (layer.keys, layer.values)
        if tensor is not None
    )
