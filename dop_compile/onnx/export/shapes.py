"""Sizes of an export's graphs: which are dynamic, and between which bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from dop_compile.onnx.export.convert import Range, Signature
from dop_compile.onnx.export.sections import LAST, Section
from dop_compile.policy.policy import Policy

__all__ = ["Shapes", "decode_signature", "past_ranges", "prefill_signature", "section_lengths"]


@dataclass(frozen=True)
class Shapes:
    """What a server will be asked; (min, opt, max) where a size is dynamic, of which a static export uses opt.

    Args:
        batch, text: rows, and tokens of the section `text` (and of `system`).
        new_tokens: how many tokens will be generated at most.
        visual_length: visual tokens of one prompt before reduction. None: as many as the examples' largest prompt has;
            "dynamic": any number up to `max_visual`.
        static: no size is dynamic, but the tokens of the embedding graph.
    """

    batch: tuple[int, int, int] = (1, 1, 8)
    text: tuple[int, int, int] = (2, 64, 1024)
    new_tokens: int = 256
    visual_length: int | Literal["dynamic"] | None = None
    max_visual: int = 4096
    static: bool = False

    def __post_init__(self) -> None:
        for name, low in (("batch", 1), ("text", 2)):
            bounds = getattr(self, name)
            if (
                len(bounds) != 3
                or not all(type(b) is int for b in bounds)
                or not low <= bounds[0] <= bounds[1] <= bounds[2]
            ):
                raise ValueError(f"{name}: expected {low} <= min <= opt <= max, got {bounds}")
        for name in ("new_tokens", "max_visual"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number >= 1, got {getattr(self, name)!r}")
        length = self.visual_length
        if length is not None and length != "dynamic" and (type(length) is not int or length < 1):
            raise ValueError(f"visual_length: expected a number >= 1, 'dynamic' or None, got {length!r}")
        if self.static and length == "dynamic":
            raise ValueError("visual_length: a static export needs a number, not 'dynamic'")

    def range(self, name: str) -> Range:
        bounds = self.batch if name == "batch" else self.text
        return Range(bounds[1], bounds[1], bounds[1]) if self.static else Range(*bounds)


def section_lengths(
    policy: Policy, sections: Sequence[Section], available: int | None, newlines: int
) -> dict[str, int | None]:
    """Static length of each section under a policy; None where it is dynamic.

    Args:
        available: visual tokens of a prompt before reduction, newlines included; None: dynamic.
        newlines: how many of those are never dropped.
    """
    lengths: dict[str, int | None] = {section.name: None for section in sections}
    if available is None:
        return lengths
    counted = available - newlines
    kept = counted if policy.visual_tokens is None else min(policy.visual_tokens, counted)
    if policy.salient_fraction is None:
        return {**lengths, "visual": max(kept + newlines, 1)}
    salient = math.floor(policy.salient_fraction * kept + 0.5)
    # A smaller image may round the other way
    return {**lengths, "visual_salient": max(salient, 1), "visual_rest": max(kept - salient + newlines + 1, 1)}


def prefill_signature(
    sections: Sequence[Section],
    lengths: Mapping[str, int | None],
    outputs: Sequence[str],
    dtype: torch.dtype,
    hidden: int,
    rows: int | None,
) -> Signature:
    inputs: list[tuple[str, torch.dtype, tuple[int | str, ...]]] = []
    for section in sections:
        size = lengths[section.name] or section.name
        leading = () if rows is None else (rows,)
        inputs.append((f"embeds.{section.name}", dtype, ("batch", size, hidden)))
        inputs.append((f"position_ids.{section.name}", torch.int64, (*leading, "batch", size)))
        inputs.append((f"slots.{section.name}", torch.int64, ("batch", size)))
    return Signature(tuple(inputs), tuple(outputs))


def decode_signature(
    classes: Sequence[Sequence[int]],
    kv_heads: Sequence[int],
    head_dims: Sequence[int],
    outputs: Sequence[str],
    dtype: torch.dtype,
    rows: int | None,
) -> Signature:
    leading = () if rows is None else (rows,)
    inputs: list[tuple[str, torch.dtype, tuple[int | str, ...]]] = [
        ("input_ids", torch.int64, ("batch", 1)),
        ("position_ids", torch.int64, (*leading, "batch", 1)),
        ("slots", torch.int64, ("batch", 1)),
    ]
    of_layer = {layer: number for number, layers in enumerate(classes) for layer in layers}
    inputs += [(f"past_slots.{number}", torch.int64, ("batch", f"past_{number}")) for number in range(len(classes))]
    for layer in sorted(of_layer):
        shape = ("batch", kv_heads[layer], f"past_{of_layer[layer]}", head_dims[layer])
        inputs += [(f"past_key_values.{layer}.{part}", dtype, shape) for part in ("key", "value")]
    return Signature(tuple(inputs), tuple(outputs))


def past_ranges(
    shapes: Shapes,
    held: Sequence[Mapping[str, Sequence[str]]],
    lengths: Mapping[str, Mapping[str, int | None]],
) -> dict[str, Range]:
    """Bounds of `past_C` over all tiers; `held` per class and tier the sections that layers hold."""
    found: dict[str, Range] = {}
    for number, tiers in enumerate(held):

        def entries(tier: str, sections: Sequence[str], which: int) -> int:
            return sum(
                lengths[tier][s] or (shapes.text[which] if s in (LAST, "system") else _visual(shapes, which))
                for s in sections
            )

        opt = max(entries(tier, sections, 1) for tier, sections in tiers.items()) + shapes.new_tokens
        top = max(entries(tier, sections, 2) for tier, sections in tiers.items()) + shapes.new_tokens
        found[f"past_{number}"] = Range(opt, opt, opt) if shapes.static else Range(1, opt, top)
    return found


def _visual(shapes: Shapes, which: int) -> int:
    return (1, min(576, shapes.max_visual), shapes.max_visual)[which]
