"""Prefill, generated tokens and batch sizes of decoders alone: the original, and its tiers in eager and compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from prefill import LLAVA_15, Geometry

from dop_compile import dop_compile
from gpu.setting import Decoder, Setting, geometry
from gpu.timing import AGAIN, ORIGINAL, looked_at, measure, per_token

__all__ = ["host", "prefill", "sweep", "tokens"]

LLAVA, LLAVA_NEXT = "llava-1.5-7b", "llava-next-7b"
TIERS = {LLAVA: ("100%", "28%", "28% split"), LLAVA_NEXT: ("100%", "14%", "9%", "14% split")}
NARROW = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 32, "num_attention_heads": 2}
STEPS = 16
"""Generated tokens that are timed together."""

INDUCTOR_ROUNDS = 5
Calls = dict[str, Callable[..., Any]]


def prefill(setting: Setting, name: str, batches: Sequence[int]) -> None:
    """Eager at every batch size, then compiled: what is cheap to find out comes first."""
    part = f"prefill {name}"
    decoder = Decoder(setting, geometry(setting, name))
    tiers = {tier: decoder.policies[tier] for tier in TIERS[name]}
    setting.store.note(part, attention=_attention_present(), layout=_layout(decoder.shape))
    ways = [("eager", False), (setting.compiler, False)]
    ways += [(setting.compiler, True)] if setting.device.type == "cuda" else []
    for backend, graphs in ways:
        compiled = dop_compile(decoder.model, tiers, backend=backend, cuda_graphs=graphs)
        before = setting.clock.left
        for batch in batches:
            title = f"{backend}{', CUDA graphs' if graphs else ''}, batch {batch}"
            if backend != "eager" and before - setting.clock.left > setting.clock.left:
                setting.store.note(part, **{title: "no time left: the batch before took longer to compile"})
                break
            before = setting.clock.left
            print(title, flush=True)
            calls = _prefills(decoder, compiled, batch)
            rows = measure(calls, _rounds(setting, backend), setting.device, setting.clock)
            setting.store.add(part, title, _shares(decoder, rows))
            rows = looked_at(_shares(decoder, rows), calls, setting.device, setting.clock)
            setting.store.add(part, title, rows)


def tokens(setting: Setting, batches: Sequence[int] = (1, 16)) -> None:
    """One generated token behind LLaVA-1.5's prompt, with the cache that `generate` makes by itself."""
    decoder = Decoder(setting, geometry(setting, LLAVA))
    tiers = {tier: decoder.policies[tier] for tier in TIERS[LLAVA]}
    compiled = dop_compile(decoder.model, tiers, backend="eager")
    for batch in batches:
        print(f"tokens, batch {batch}", flush=True)
        rows = _token_rows(setting, _generations(decoder, compiled, batch))
        setting.store.add("generated token", f"eager, batch {batch}, {_layout(decoder.shape)}", rows)


def host(setting: Setting) -> None:
    """A decoder of 32 layers x 32 hidden, whose arithmetic costs nothing: what is left is the host's time."""
    part = "host time"
    shape = dataclasses.replace(
        geometry(setting, LLAVA),
        config=NARROW | ({"num_hidden_layers": 4} if setting.tiny else {}),
        system=4,
        visual=16,
        text=12,
        published={tier: (mha, mlp, 4) for tier, (mha, mlp, _) in LLAVA_15.items()},
    )
    decoder = Decoder(setting, shape, vocabulary=64)
    tiers = {tier: decoder.policies[tier] for tier in TIERS[LLAVA]}
    for backend in ("eager", setting.compiler):
        compiled = dop_compile(decoder.model, tiers, backend=backend)
        print(f"host, prefill, {backend}", flush=True)
        calls = _prefills(decoder, compiled, 1)
        rows = measure(calls, 3 * setting.rounds, setting.device, setting.clock)
        if backend == "eager":
            rows = looked_at(rows, calls, setting.device, setting.clock)
        setting.store.add(part, f"{backend}, prefill", rows)
        print(f"host, token, {backend}", flush=True)
        generations = _generations(decoder, compiled, 1)
        setting.store.add(part, f"{backend}, token", _token_rows(setting, generations))
        if backend == "eager":
            setting.store.add(part, "host waits of 4 further tokens", _waits(setting, generations))


def sweep(setting: Setting, batches: Sequence[int] = (1, 2, 4, 8, 16, 32)) -> None:
    """LLaVA-1.5's prefill in batches: milliseconds per request, and which tiers are slower than the original."""
    decoder = Decoder(setting, geometry(setting, LLAVA))
    tiers = {tier: decoder.policies[tier] for tier in TIERS[LLAVA]}
    compiled = dop_compile(decoder.model, tiers, backend="eager")
    found: list[dict[str, Any]] = []
    for batch in batches:
        print(f"sweep, batch {batch}", flush=True)
        calls = _prefills(decoder, compiled, batch)
        del calls[AGAIN]
        for row in measure(calls, setting.rounds, setting.device, setting.clock):
            row["name"] = f"batch {batch}: {row['name']}"
            if "ms" in row:
                row["per_request_ms"] = row["ms"] / batch
                row["slower"] = "slower than the original" if row.get("quartiles", (0, 0))[0] > 1 else None
            found.append(row)
        setting.store.add("concurrency", "prefill, eager", found)


def _rounds(setting: Setting, backend: str) -> int:
    return setting.rounds if backend == "eager" else min(setting.rounds, INDUCTOR_ROUNDS)


def _prefills(decoder: Decoder, compiled: Any, batch: int) -> Calls:
    original = decoder.prefill(decoder.model, batch)
    calls: Calls = {ORIGINAL: original, AGAIN: original}
    return calls | {tier: decoder.prefill(compiled, batch, tier) for tier in compiled.dop.tiers}


def _generations(decoder: Decoder, compiled: Any, batch: int) -> Calls:
    original = decoder.generate(decoder.model, batch)
    calls: Calls = {ORIGINAL: original, AGAIN: original}
    return calls | {tier: decoder.generate(compiled, batch, tier) for tier in compiled.dop.tiers}


def _token_rows(setting: Setting, calls: Calls) -> list[dict[str, Any]]:
    return measure(calls, setting.rounds, setting.device, setting.clock, take=per_token(STEPS))


def _waits(setting: Setting, calls: Calls) -> list[dict[str, Any]]:
    """Of prefill and five tokens, and of prefill and one, so that the difference is that of four tokens."""
    rows = []
    for name in (name for name in calls if name != AGAIN):
        for count in (1, 5):
            rows.append({"name": f"{name}: {count} tokens"})
            call = {f"{name}: {count} tokens": lambda name=name, count=count: calls[name](count)}
            looked_at(rows[-1:], call, setting.device, setting.clock)
    return rows


def _shares(decoder: Decoder, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"eq11": decoder.share(row["name"])} for row in rows]


def _layout(shape: Geometry) -> str:
    return f"{shape.system} + {shape.visual} + {shape.text} tokens"


def _attention_present() -> str:
    """Which FlashAttention there is: torch's own kernels, and the packages that transformers can use instead."""
    from importlib.util import find_spec

    kernels: Any = torch.backends.cuda
    enabled = {
        "flash": kernels.flash_sdp_enabled(),
        "memory-efficient": kernels.mem_efficient_sdp_enabled(),
        "cuDNN": kernels.cudnn_sdp_enabled(),
    }
    packages = [f"{name} {'present' if find_spec(name) else 'missing'}" for name in ("flash_attn", "kernels")]
    return f"torch's sdpa has {', '.join(name for name, on in enabled.items() if on)}; {', '.join(packages)}"
