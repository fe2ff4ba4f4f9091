"""What a benchmark found: every round's times, and what follows from them."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass
from typing import Any

from dop_compile.timing.rounds import Ratio, ratio

__all__ = ["AGAIN", "FULL", "ORIGINAL", "Benchmark", "Contender", "Setting", "Timing"]

ORIGINAL, AGAIN, FULL = "original", "original again", "full"
"""The untouched model, the same once more (A/A), and the compiled model with nothing pruned."""

RATIOS = ("prefill_ms", "first_token_ms", "decode_ms")
MEDIANS = ("vision_ms", "selection_ms", *RATIOS, "memory_bytes")


@dataclass(frozen=True)
class Timing:
    """One `generate` of a batch; the parts are those of `dop_compile.evaluation.clock`.

    Args:
        vision_ms, selection_ms, prefill_ms: of the batch.
        decode_ms: per step after the first, which gives every row a token; None where there is none.
        memory_bytes: the peak, weights included; None where it is not known.
    """

    vision_ms: float
    selection_ms: float
    prefill_ms: float
    decode_ms: float | None
    memory_bytes: int | None

    @property
    def first_token_ms(self) -> float:
        """From the call to the first token."""
        return self.vision_ms + self.selection_ms + self.prefill_ms


@dataclass(frozen=True)
class Contender:
    """One model or tier in one setting.

    Args:
        name: `ORIGINAL`, `AGAIN`, `FULL` or the tier's.
        timings: of each round.
        kv_bytes: of the batch's cache after prefill, as stored.
        eq11_ratio, executed_ratio: policy FLOPs and executed FLOPs as fractions of the original's; None where the
            model's sizes are not known.
    """

    name: str
    timings: tuple[Timing, ...]
    kv_bytes: int
    eq11_ratio: float | None = None
    executed_ratio: float | None = None

    def median(self, field: str) -> float | None:
        """Over the rounds, of a field of `Timing`; None where it is not known in every round."""
        values = [getattr(timing, field) for timing in self.timings]
        return None if None in values else statistics.median(values)


@dataclass(frozen=True)
class Setting:
    """One backend and one batch size; the first contender is the original."""

    backend: str
    batch: int
    contenders: tuple[Contender, ...]

    def contender(self, name: str) -> Contender:
        return next(contender for contender in self.contenders if contender.name == name)

    def ratio(self, name: str, field: str) -> Ratio | None:
        """Of a contender's times to the original's in the same rounds; None where they are not known."""
        own, base = ([getattr(t, field) for t in self.contender(n).timings] for n in (name, ORIGINAL))
        return None if None in [*own, *base] or not all(base) else ratio(own, base)

    def tokens_per_second(self, name: str) -> float | None:
        """New tokens of all rows together, while decoding."""
        step = self.contender(name).median("decode_ms")
        return 1000 * self.batch / step if step else None


@dataclass(frozen=True)
class Benchmark:
    """A whole run.

    Args:
        model: class name; with `fingerprint` and `dtype` it says which.
        counts: system, visual and text tokens of the prompt, before reduction.
        new_tokens: of every answer.
        environment: machine, versions, command line (`dop_compile.evaluation.environment`).
        settings: in the order in which they were measured.
    """

    model: str
    fingerprint: str
    dtype: str
    counts: tuple[int, int, int]
    new_tokens: int
    environment: dict[str, Any]
    settings: tuple[Setting, ...]

    def to_json(self) -> str:
        """Every round, and the medians and ratios that the table shows."""
        content = dataclasses.asdict(self)
        for entry, setting in zip(content["settings"], self.settings, strict=True):
            for row, contender in zip(entry["contenders"], setting.contenders, strict=True):
                row["medians"] = {field: contender.median(field) for field in MEDIANS}
                row["tokens_per_second"] = setting.tokens_per_second(contender.name)
                row["of_original"] = {field: _plain(setting.ratio(contender.name, field)) for field in RATIOS}
        return json.dumps(content, indent=1) + "\n"


def _plain(found: Ratio | None) -> dict[str, float] | None:
    return None if found is None else dataclasses.asdict(found)
