"""What the export's tests share: small models of the five families, and the exported modules run in PyTorch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dop_compile import Policy
from dop_compile.onnx.contract.parts import SectionInfo
from dop_compile.onnx.export.capture import capture_prompt
from dop_compile.onnx.export.graphs import Decode, Prefill
from dop_compile.onnx.export.sections import past_classes, tier_sections
from dop_compile.onnx.run.prepare import Prepared, prepare
from tests.conformance.table import EXACT
from tests.families import IMAGE, VIDEO, Family, Segment
from tests.support import Batch, make_batch

FIVE = ("llava", "llava_next", "qwen2_5_vl", "internvl", "video_llava")
EXPORTED = [
    "llava",
    "qwen2_5_vl",
    *(pytest.param(name, marks=pytest.mark.conformance) for name in ("llava_next", "internvl", "video_llava")),
]
"""The five where they are exported, which takes most of a minute each: plain and M-RoPE positions in every run."""
LAYERS = 2


def _cut(config: Callable[[], Any], layers: int) -> Callable[[], Any]:
    def small() -> Any:
        made = config()
        text = made.get_text_config(decoder=True)
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        return made

    return small


def small_family(name: str, layers: int = LAYERS) -> Family:
    """A family with few layers: an export takes seconds per layer."""
    family = EXACT[name]
    return dataclasses.replace(family, config=_cut(family.config, layers), num_layers=layers)


@functools.cache
def small_model(name: str, layers: int = LAYERS) -> nn.Module:
    return small_family(name, layers).build()


def small_batch(name: str, rows: Sequence[Sequence[Segment]], layers: int = LAYERS, seed: int = 0) -> Batch:
    batch = make_batch(name, rows, model=small_model(name, layers), seed=seed)
    return dataclasses.replace(batch, family=small_family(name, layers))


def tier_infos(policies: Sequence[Policy]) -> list[tuple[SectionInfo, ...]]:
    """Dynamic sections of each policy."""
    return [tuple(SectionInfo(s.name, s.groups, None) for s in sections) for sections in tier_sections(policies)]


def prepared(batch: Batch, policy: Policy, sections: Sequence[SectionInfo], given: Any = None) -> Prepared:
    """A batch for a tier, with the embeddings that the model itself hands to its decoder."""
    seen = capture_prompt(batch.model, batch.inputs)
    ids = batch.inputs["input_ids"]
    visual = torch.isin(ids, torch.tensor([IMAGE, VIDEO]))
    newlines = None if seen.newline is None else visual & (seen.embeds == seen.newline).all(-1)
    positions = seen.positions
    if positions is None or positions.dim() == 2:
        positions = (batch.mask.long().cumsum(1) - 1).clamp(min=0)
    return prepare(
        policy,
        sections,
        seen.embeds,
        batch.mask,
        positions,
        visual,
        newlines=newlines,
        items=batch.items,
        visual_indices=given,
    )


Run = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def greedy(
    prompt: Prepared,
    held: Sequence[Sequence[str]],
    layers: Sequence[Sequence[int]],
    prefill: Run,
    decode: Run,
    rows: int | None,
    tokens: int,
) -> tuple[Tensor, list[list[int]]]:
    """First-token logits (batch, vocabulary) and greedy ids of each row, by any way of running the two graphs.

    Args:
        held: per past class the sections whose entries its layers hold.
        layers: of each past class.
        rows: axes of positions, None for plain ones.
    """
    out = prefill(prompt.inputs)
    first = logits = out["logits"]
    batch = len(logits)
    nothing = torch.empty(batch, 0, dtype=torch.long)
    slots = [torch.cat([prompt.section_slots[s] for s in names] or [nothing], 1) for names in held]
    sample = next(value for name, value in out.items() if name.startswith("present."))
    past = {}
    for number in sorted(n for group in layers for n in group):
        for part in ("key", "value"):
            empty = sample.new_zeros(batch, sample.shape[1], 0, sample.shape[3])
            past[f"past_key_values.{number}.{part}"] = out.get(f"present.{number}.{part}", empty)
    slot, position = prompt.next_slots[:, None], prompt.next_positions[:, None]
    ids = [logits.argmax(-1)]
    while len(ids) < tokens:
        axes = position if rows is None else position.expand(rows, -1, -1)
        feeds = {"input_ids": ids[-1][:, None], "position_ids": axes, "slots": slot, **past}
        out = decode({**feeds, **{f"past_slots.{n}": value for n, value in enumerate(slots)}})
        ids.append(out["logits"].argmax(-1))
        past = {n: torch.cat([v, out[n.replace("past_key_values", "new")]], 2) for n, v in past.items()}
        slots = [torch.cat([value, slot], 1) for value in slots]
        slot, position = slot + 1, position + 1
    return first, torch.stack(ids, 1).tolist()


def by_name(module: Any) -> Run:
    """A module that is exported, run in PyTorch."""

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            return dict(zip(module.output_names, module(*(inputs[n] for n in module.input_names)), strict=True))

    return run


def greedy_in_pytorch(batch: Batch, policy: Policy, tokens: int, given: Any = None) -> tuple[Tensor, list[list[int]]]:
    """The exported modules of one tier, not exported."""
    (sections,) = tier_sections([policy])
    (infos,) = tier_infos([policy])
    rows = 3 if batch.family.has_mrope else None
    classes = past_classes({"t": policy}, {"t": sections})
    layers = [group for group, _ in classes]
    prefill, decode = Prefill(batch.model, policy, sections, rows), Decode(batch.model, layers, rows)
    held = [tiers["t"] for _, tiers in classes]
    prompt = prepared(batch, policy, infos, given)
    return greedy(prompt, held, layers, by_name(prefill), by_name(decode), rows, tokens)
