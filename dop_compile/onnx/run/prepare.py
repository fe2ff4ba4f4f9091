"""From a processor's output to a prefill graph's inputs: positions, groups, reduction, sections.

Used by `verify` and by runtimes. Everything is on the CPU; grouping and reduction are the compiler's own
(`dop_compile.runtime.prompt`), so that they agree with the PyTorch model by construction.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dop_compile.onnx.contract.manifest import Manifest
from dop_compile.onnx.contract.parts import SectionInfo
from dop_compile.policy.policy import Policy
from dop_compile.reducers import Reducer
from dop_compile.runtime.layout import NO_TOKEN
from dop_compile.runtime.prompt import Prompt, Reduction, call_groups, make_reducer, reduce_prompt

LEAST = 2
"""Tokens of a dynamic section at least: graphs are traced with sizes that are not 1."""

__all__ = ["Prepared", "placeholders", "prepare", "prompt_positions"]


@dataclass(frozen=True)
class Prepared:
    """A batch as a tier's prefill takes it.

    Attributes:
        inputs: the graph's inputs by name.
        section_slots: per section, (batch, length) slots: what `past_slots` begin with.
        next_slots: (batch,) slot of the first generated token.
        next_positions: (batch,) its position, on every axis.
    """

    inputs: dict[str, Tensor]
    section_slots: dict[str, Tensor]
    next_slots: Tensor
    next_positions: Tensor


def placeholders(manifest: Manifest, input_ids: Tensor) -> Tensor:
    """(batch, tokens) bool: places of visual features."""
    ids = torch.tensor(list(manifest.placeholder_ids.values()), dtype=torch.long)
    places: Tensor = torch.isin(input_ids, ids)
    return places


def prompt_positions(model: Any, manifest: Manifest, inputs: Mapping[str, Any]) -> Tensor:
    """Positions of a prompt before reduction: (batch, tokens), or (rows, batch, tokens).

    Args:
        model: of the exported class, weights not needed (meta device); used where `manifest.positions` is "model".
        inputs: what the processor returned for the batch.
    """
    mask: Tensor = inputs["attention_mask"]
    plain = (mask.long().cumsum(-1) - 1).clamp(min=0)
    rows = manifest.position_rows
    if manifest.positions == "sequential" or rows is None:
        return plain
    owner = next(m for m in (model, *model.modules()) if hasattr(type(m), "get_rope_index"))
    visual = any(isinstance(v, Tensor) and v.is_floating_point() for v in inputs.values())
    if not visual:
        return plain.expand(rows, -1, -1)
    known = inspect.signature(owner.get_rope_index).parameters
    given = {n: v for n, v in inputs.items() if n in known and v is not None}
    positions: Tensor = owner.get_rope_index(**given)[0]
    return positions if positions.shape[0] == rows else torch.cat([plain[None], positions])


def prepare(
    policy: Policy,
    sections: Sequence[SectionInfo],
    embeds: Tensor,
    attention_mask: Tensor,
    positions: Tensor,
    visual: Tensor,
    *,
    newlines: Tensor | None = None,
    items: Tensor | None = None,
    visual_indices: Sequence[Any] | None = None,
    around: Callable[[Reducer], Reducer] | None = None,
) -> Prepared:
    """A left-padded batch as the inputs of a tier's prefill graph.

    Args:
        policy, sections: the tier's.
        embeds: (batch, tokens, hidden) in any float dtype, with features in the places of placeholders.
        attention_mask: (batch, tokens).
        positions: from `prompt_positions`.
        visual: (batch, tokens) bool, from `placeholders`.
        newlines: (batch, tokens) bool, which placeholders are row separators.
        items: (batch, tokens) int64, the image or video that each placeholder belongs to, -1 where that is not known;
            None: nowhere. There a run of placeholders is taken for one.
        visual_indices: per row, for the reducer "given".
        around: makes the reducer that is asked in place of the policy's (`GraphReducer`).

    Raises:
        ValueError: padding on the right, more tokens than a static section holds, no text after the images.
    """
    valid = attention_mask.bool()
    if not bool(valid[:, -1].all()):
        raise ValueError("attention_mask: expected padding on the left, a row ends with padding")
    visual = visual & valid
    newlines = torch.zeros_like(visual) if newlines is None else newlines & visual
    system = (visual.long().cumsum(1) == 0) & visual.any(1, keepdim=True) & valid
    prompt = Prompt(embeds, valid, visual, newlines, system, items=items)
    reducer = make_reducer(policy, visual_indices, len(embeds)) if bool(visual.any()) else None
    if reducer is not None and around is not None:
        reducer = around(reducer)
    reduction = reduce_prompt(prompt, policy, reducer)
    return _sections(policy, sections, prompt, reduction, positions)


def _sections(
    policy: Policy,
    sections: Sequence[SectionInfo],
    prompt: Prompt,
    reduction: Reduction,
    positions: Tensor,
) -> Prepared:
    columns = reduction.columns
    if columns is None:
        columns = torch.arange(prompt.valid.shape[1]).expand_as(prompt.valid)
    codes = reduction.codes
    real = codes != NO_TOKEN
    slots = real.long().cumsum(1) - 1
    embeds = prompt.embeds.gather(1, columns.clamp(min=0)[..., None].expand(-1, -1, prompt.embeds.shape[-1]))
    for row, places, features in reduction.features:
        embeds[row, places] = features.to(embeds)
    whole = positions.expand(*positions.shape[:-2], *prompt.valid.shape)
    sources = columns if reduction.position_columns is None else reduction.position_columns
    taken = whole.gather(-1, sources.clamp(min=0).expand(*whole.shape[:-2], -1, -1))
    last = torch.where(prompt.valid, whole, -1).amax(-1)
    last = last.amax(0) if last.dim() == 2 else last
    if policy.positions == "compact":
        if reduction.dropped_before is not None:
            taken = taken - reduction.dropped_before
        if reduction.dropped is not None:
            last = last - reduction.dropped[:, 0]
    groups = call_groups(policy)
    inputs: dict[str, Tensor] = {}
    section_slots: dict[str, Tensor] = {}
    for section in sections:
        wanted = torch.tensor([group in section.groups for group in groups] + [False])
        members = wanted[codes]
        index, held = _grid(members, section.length, section.name)
        inputs[f"embeds.{section.name}"] = torch.where(
            held[..., None], embeds.gather(1, index[..., None].expand(-1, -1, embeds.shape[-1])), 0
        )
        place = index.expand(*taken.shape[:-2], -1, -1)
        inputs[f"position_ids.{section.name}"] = torch.where(held, taken.gather(-1, place), 0).clamp(min=0)
        section_slots[section.name] = torch.where(held, slots.gather(1, index), -1)
        inputs[f"slots.{section.name}"] = section_slots[section.name]
    ends = section_slots["text"][:, -1]
    if not torch.equal(ends, slots[:, -1]):
        raise ValueError("the prompt ends with a visual token; it needs text after its images")
    return Prepared(inputs, section_slots, slots[:, -1] + 1, last + 1)


def _grid(members: Tensor, length: int | None, name: str) -> tuple[Tensor, Tensor]:
    """Columns of a section's members, right-aligned (batch, length), and which of them there are."""
    counts = members.sum(1)
    widest = int(counts.max())
    if length is not None and widest > length:
        raise ValueError(
            f"{widest} tokens in section {name!r}, which was exported for {length}; export with a larger length, or "
            "give smaller images"
        )
    width = max(widest, LEAST) if length is None else length
    order = torch.argsort(members.to(torch.int8), dim=1, stable=True)
    if width > order.shape[1]:
        order = torch.nn.functional.pad(order, (width - order.shape[1], 0))
    return order[:, order.shape[1] - width :], torch.arange(width) >= width - counts[:, None]
