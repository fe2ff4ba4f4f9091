"""A benchmark as Markdown."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from dop_compile.reports.table import EXECUTED_FLOPS, POLICY_FLOPS, show_bytes, show_percent
from dop_compile.timing.result import AGAIN, ORIGINAL, Benchmark, Contender, Setting

__all__ = ["markdown"]

HEADS = ("", POLICY_FLOPS, EXECUTED_FLOPS, "KV cache", "vision ms", "selection ms", "prefill ms", "of original",
         "first token ms", "decode ms/token", "of original", "tokens/s", "peak memory")  # fmt: skip


def markdown(result: Benchmark) -> str:
    """What was measured where, and a table per backend and batch size with a line on what the machine can resolve."""
    where = result.environment
    versions = ", ".join(f"{name} {where['packages'][name]}" for name in ("torch", "transformers", "dop_compile"))
    system, visual, text = result.counts
    program, *options = where["command"]
    rounds = len(result.settings[0].contenders[0].timings)
    lines = [
        f"{result.model} ({result.fingerprint[:12]}), {result.dtype}, prompt of {system} system + {visual} visual + "
        f"{text} text tokens, {result.new_tokens} new tokens; {where['device']}, {where['threads']} threads, "
        f"{versions}, Python {where['python']}.",
        "",
        f"`{shlex.join([Path(program).name, *options])}`",
    ]
    for setting in result.settings:
        lines += ["", f"**{setting.backend}, batch {setting.batch}**", "", _line(HEADS), _line(["---"] * len(HEADS))]
        lines += [_line(_cells(setting, contender)) for contender in setting.contenders]
        lines += ["", _resolution(setting)]
    lines += [
        "",
        f"Medians of {rounds} interleaved rounds; of original: the median of the ratios within a round, and its "
        f"quartiles. {POLICY_FLOPS} (eq. 11 at this prompt's token counts) and {EXECUTED_FLOPS} (without work that "
        "reaches no output): of the decoder's prefill. vision: all before the decoder. "
        "decode: per step after the first. The original is not compiled; `full` is, with nothing pruned. peak memory: "
        f"{where['memory']}.",
    ]
    return "\n".join(lines)


def _resolution(setting: Setting) -> str:
    """What the machine can tell apart."""
    parts = []
    for field, word in (("prefill_ms", "prefill"), ("first_token_ms", "first token"), ("decode_ms", "decode")):
        if (found := setting.ratio(AGAIN, field)) is not None:
            parts.append(f"{word} {found.low:.3f}-{found.high:.3f}")
    return f"A/A (the original against itself, quartiles): {', '.join(parts)}; smaller differences are noise."


def _cells(setting: Setting, contender: Contender) -> list[str]:
    name = contender.name

    def share(field: str) -> str:
        found = None if name == ORIGINAL else setting.ratio(name, field)
        return "" if found is None else f"{found.median:.3f} ({found.low:.3f}-{found.high:.3f})"

    def median(field: str) -> str:
        return _number(contender.median(field))

    return [
        name,
        show_percent(contender.eq11_ratio),
        show_percent(contender.executed_ratio),
        show_bytes(contender.kv_bytes),
        median("vision_ms"),
        median("selection_ms"),
        median("prefill_ms"),
        share("prefill_ms"),
        median("first_token_ms"),
        median("decode_ms"),
        share("decode_ms"),
        _number(setting.tokens_per_second(name)),
        show_bytes(contender.median("memory_bytes")),
    ]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
