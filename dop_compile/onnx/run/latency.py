"""How long tiers take on this machine, measured with their graphs, and the largest one that fits a budget."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dop_compile.onnx.contract.parts import Tier, VisionGraph
from dop_compile.onnx.run.bound_sessions import BoundStages
from dop_compile.onnx.run.decode import Decoder
from dop_compile.onnx.run.prepare import Prepared, prepare

__all__ = ["TierLatency", "largest_fitting", "measure_tier", "measure_vision", "tier_tokens"]

RUNS = 3


@dataclass(frozen=True)
class TierLatency:
    """Medians of one tier.

    Args:
        points: (tokens that enter its prefill, milliseconds of reduction and prefill), ascending.
        decode_ms: one more token for a batch of the usual size (the profile's `opt`).
    """

    points: tuple[tuple[int, float], ...]
    decode_ms: float

    def prefill_ms(self, tokens: int) -> float:
        """Predicted for a batch of this many tokens, padding included: linear, and not below the smallest measured."""
        (first, ms), (last, last_ms) = self.points[0], self.points[-1]
        slope = max((last_ms - ms) / (last - first), 0.0) if last > first else ms / first
        return ms + slope * max(tokens - first, 0)


def _median_ms(call: Callable[[], object]) -> float:
    call()  # the first run allocates
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def measure_vision(stages: BoundStages, vision: VisionGraph) -> float:
    """Milliseconds of one image or video."""
    pixels = torch.zeros(vision.example)
    return _median_ms(lambda: stages.session(vision.graph).run({vision.pixels: pixels}))


def measure_tier(stages: BoundStages, name: str) -> TierLatency:
    """Reduction, prefill and decoding of made-up prompts with as many visual tokens as the example of the export."""
    manifest, tier = stages.manifest, stages.manifest.tiers[name]
    session = stages.session(tier.prefill)
    text = next(spec for spec in session.graph.inputs if spec.name == "slots.text")
    lengths = [text.opt[1]] if isinstance(text.shape[1], int) else [text.opt[1], max(text.max[1] // 4, text.opt[1])]
    points: dict[int, float] = {}
    for length in sorted(set(lengths)):
        made = _prompt(stages, name, text.opt[0], length)
        if not points:
            prepared = made()
            decoder = Decoder(
                stages.session(tier.decode),
                manifest,
                name,
                prepared,
                session.run_in_place(prepared.inputs),
                steps=1,
            )
            decode_ms = _median_ms(decoder.run)
        tokens = sum(slots.numel() for slots in made().section_slots.values())
        points[tokens] = _median_ms(lambda made=made: session.run_in_place(made().inputs))  # type: ignore[misc]
    return TierLatency(tuple(sorted(points.items())), decode_ms)


def _prompt(stages: BoundStages, name: str, batch: int, length: int) -> Callable[[], Prepared]:
    """What prepares a prompt whose section `text` has this length."""
    manifest, tier, around = stages.manifest, stages.manifest.tiers[name], stages.reducer(name)
    visual = tier.counts[1]
    total = visual + length
    places = torch.zeros(batch, total, dtype=torch.bool)
    places[:, :visual] = True
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(batch, total, manifest.model.hidden_size, generator=generator)
    mask = torch.ones(batch, total, dtype=torch.long)
    positions = torch.arange(total).expand(batch, -1)
    if manifest.position_rows is not None:
        positions = positions.expand(manifest.position_rows, -1, -1)
    given = None
    if tier.policy.reducer == "given":
        kept = min(tier.policy.visual_tokens or visual, visual)
        given = [list(range(kept))] * batch

    def made() -> Prepared:
        return prepare(tier.policy, tier.sections, embeds, mask, positions, places, visual_indices=given, around=around)

    return made


def tier_tokens(tier: Tier, mask: Tensor, visual: Tensor) -> int:
    """Tokens, padding included, that a batch's prompts are in a tier's prefill.

    Args:
        mask, visual: (batch, tokens) bool.
    """
    pictures = int(visual.sum(1).max())
    if tier.policy.visual_tokens is not None:
        pictures = min(pictures, tier.policy.visual_tokens)
    text = int((mask & ~visual).sum(1).max())
    static = [section.length for section in tier.sections if section.length is not None]
    dynamic = {group for section in tier.sections if section.length is None for group in section.groups}
    length = sum(static) + (text if "text" in dynamic else 0)
    length += pictures if any(group.startswith("visual") for group in dynamic) else 0
    return len(mask) * length


def largest_fitting(tiers: Mapping[str, Tier], predicted: Mapping[str, float], max_ms: float) -> str:
    """The tier of the most operations whose predicted milliseconds are within `max_ms`; of equals, the first.

    Raises:
        ValueError: none is.
    """
    if not tiers:
        raise ValueError("max_ms: no tier takes this call's visual_indices; name a tier")
    fitting = [name for name in tiers if predicted[name] <= max_ms]
    if not fitting:
        fastest = min(tiers, key=lambda name: predicted[name])
        raise ValueError(
            f"max_ms: no tier is predicted to fit {max_ms:g} ms; the fastest, {fastest!r}, takes about "
            f"{predicted[fastest]:.3g} ms for this prompt; allow more, or name a tier"
        )
    return max(fitting, key=lambda name: tiers[name].eq11_flops or tiers[name].executed_flops or 0)
