"""From a caller's prompt to the decoder's slots: token groups and visual token reduction.

Groups: `system` before the first visual token of a conversation's first call, `visual` every image or video
placeholder, `text` the rest; a row without visual tokens is all `text`. With a split policy the reducer's ranking
divides `visual` in `visual_salient` and `visual_rest`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dop_compile.errors import UnsupportedUsageError
from dop_compile.policy.policy import Policy
from dop_compile.reducers import GivenReducer, Reducer, VisualContext, create, needs, select_batch
from dop_compile.runtime.layout import NO_TOKEN
from dop_compile.vision.prompt import VISION_FIELDS, PromptVision

__all__ = ["Prompt", "Reduction", "call_groups", "make_reducer", "reduce_prompt"]


@dataclass(frozen=True)
class Prompt:
    """What a call hands to the decoder, as far as groups and reduction need it; all masks on the CPU.

    Args:
        embeds: (batch, tokens, hidden) embeddings with visual features merged in.
        valid: (batch, tokens) bool, False on padding.
        visual: (batch, tokens) bool, image and video placeholders.
        newline: (batch, tokens) bool, the part of `visual` that is a newline embedding.
        system: (batch, tokens) bool.
        output: (tokens,) bool, what was generated after the prompt and is computed again with it.
        vision: what is known about the vision tower's work on it; None where the caller said which tokens are visual.
        input_ids: (batch, tokens), if the caller passed them.
        items: (batch, tokens) int64, the image or video that each placeholder belongs to, -1 where that is not known;
            None: what `vision` knows.
    """

    embeds: Tensor
    valid: Tensor
    visual: Tensor
    newline: Tensor
    system: Tensor
    output: Tensor | None = None
    vision: PromptVision | None = None
    input_ids: Tensor | None = None
    items: Tensor | None = None


def call_groups(policy: Policy) -> tuple[str, ...]:
    """The groups that the tokens of one call can have, in the order of their codes."""
    return (*policy.groups, "output")


@dataclass(frozen=True)
class Reduction:
    """The decoder's slots.

    Args:
        columns: (batch, slots) caller's column of each slot, -1 for padding; None where every column is a slot.
        codes: (batch, slots) index into `call_groups`, `NO_TOKEN` for padding.
        dropped_before: (batch, slots) tokens removed before each slot, for re-numbered positions.
        dropped: (batch, 1) tokens removed from each row.
        features: (batch row, slot, feature) replacements by a reducer that merges tokens.
        position_columns: (batch, slots) column whose position each slot takes.
    """

    columns: Tensor | None
    codes: Tensor
    dropped_before: Tensor | None = None
    dropped: Tensor | None = None
    features: tuple[tuple[int, Tensor, Tensor], ...] = ()
    position_columns: Tensor | None = None


def make_reducer(policy: Policy, given: Sequence[Any] | None, batch: int) -> Reducer | None:
    """The reducer a call needs; None where the policy keeps every visual token unranked.

    Raises:
        ValueError: indices given without the reducer "given", or the reverse.
    """
    if given is not None and policy.reducer != "given":
        raise ValueError(
            f"visual_indices are given, but the policy's reducer is {policy.reducer!r}; use a policy with "
            "reducer='given'"
        )
    if policy.reducer == "given":
        if given is None:
            raise ValueError(
                "the policy's reducer is 'given': pass visual_indices=, one sequence of visual token indices per "
                "sample, with every prompt that contains visual tokens"
            )
        rows = GivenReducer(given).indices
        if not rows or batch % len(rows):
            raise ValueError(f"visual_indices are for {len(rows)} samples, but the batch has {batch}")
        # generate repeats rows for beams and returned sequences
        return GivenReducer([row for row in rows for _ in range(batch // len(rows))])
    if policy.visual_tokens is None and policy.salient_fraction is None:
        return None
    return create(policy.reducer, policy.options)


def _segments(columns: Tensor, visual: Tensor, items: Tensor | None) -> Tensor:
    """Number, from 0 in order of appearance, of the image or video that each column belongs to.

    Where the row's `items` (tokens,) are -1 or None, a contiguous run of placeholders is taken for one.
    """
    items = torch.full_like(visual, -1, dtype=torch.long) if items is None else items
    unknown = visual & (items < 0)
    starts = unknown & ~torch.cat([torch.zeros(1, dtype=torch.bool, device="cpu"), unknown[:-1]])
    numbers = torch.where(unknown, items.max() + starts.cumsum(0), items)
    names, own = torch.unique(numbers[columns], return_inverse=True)
    places = torch.arange(len(own), device="cpu")
    first = torch.full_like(names, len(own)).scatter_reduce(0, own, places, "amin")
    return first.argsort().argsort()[own]


def _contexts(prompt: Prompt, counted: Tensor, reducer: Reducer) -> list[VisualContext]:
    """One context per row that has visual tokens; `counted` (batch, tokens) bool are those that can be dropped.

    Raises:
        UnsupportedUsageError: the reducer wants to know more than is known.
    """
    wanted, vision = needs(reducer), prompt.vision
    if vision is not None and wanted & VISION_FIELDS:
        vision.check(reducer, counted)
    if "text_ids" in wanted and prompt.input_ids is None:
        raise UnsupportedUsageError(f"reducer {reducer.name!r} reads the text: pass input_ids, not inputs_embeds alone")
    text = prompt.valid & ~prompt.visual
    if prompt.output is not None:
        text = text & ~prompt.output
    items = vision.items if prompt.items is None and vision is not None else prompt.items
    rows = counted.any(dim=1).nonzero().squeeze(1).tolist()
    visual_rows, text_rows = (_rows(prompt.embeds, mask, rows) for mask in (counted, text))
    contexts = []
    for row, projected, others in zip(rows, visual_rows, text_rows, strict=True):
        columns = counted[row].nonzero().squeeze(1)
        segments = _segments(columns, prompt.visual[row], None if items is None else items[row])
        fields: dict[str, Any] = {}
        if vision is not None:
            fields = vision.fields(row, columns, segments, wanted)
        elif "tiles" in wanted:  # tokens that the caller calls visual are of no tiles
            fields = {"tiles": torch.zeros_like(columns)}
        if "text_ids" in wanted and prompt.input_ids is not None:
            fields["text_ids"] = prompt.input_ids[row, text[row].to(prompt.input_ids.device)]
        before = int(text[row, : int(columns[0])].sum())
        contexts.append(VisualContext(projected, others, segments, row, instruction_start=before, **fields))
    return contexts


def _rows(embeds: Tensor, mask: Tensor, rows: list[int]) -> list[Tensor]:
    """The masked embeddings of each row, taken at once."""
    places = mask[rows].nonzero()
    taken = embeds[torch.tensor(rows, device="cpu")[places[:, 0]].to(embeds.device), places[:, 1].to(embeds.device)]
    return list(torch.split(taken, mask[rows].sum(dim=1).tolist()))


def _count(policy: Policy, reducer: Reducer, row: int, tokens: int) -> int:
    if isinstance(reducer, GivenReducer) and policy.visual_tokens is None:
        return reducer.counts[row] if row < len(reducer.counts) else tokens
    return tokens if policy.visual_tokens is None else min(policy.visual_tokens, tokens)


def reduce_prompt(prompt: Prompt, policy: Policy, reducer: Reducer | None) -> Reduction:
    """Assign groups and let the reducer drop visual tokens, row by row.

    Raises:
        ValueError: the reducer returned duplicates, indices out of range or a wrong number (see `select_tokens`).
    """
    number = {group: index for index, group in enumerate(call_groups(policy))}
    codes = torch.full(prompt.valid.shape, number["text"], device="cpu")
    codes[prompt.system] = number["system"]
    if prompt.output is not None:
        codes[:, prompt.output] = number["output"]
    codes[prompt.visual] = number.get("visual", number.get("visual_rest", -1))
    codes[~prompt.valid] = NO_TOKEN
    if reducer is None:
        return Reduction(None, codes)
    keep = prompt.valid.clone()
    position_columns = torch.arange(keep.shape[1], device="cpu").repeat(keep.shape[0], 1)
    features: list[tuple[int, Tensor, Tensor]] = []
    counted = prompt.visual & ~prompt.newline & prompt.valid
    contexts = _contexts(prompt, counted, reducer)
    counts = [_count(policy, reducer, context.sample_index, context.tokens) for context in contexts]
    for context, selection in zip(contexts, select_batch(reducer, contexts, counts), strict=True):
        row = context.sample_index
        columns = counted[row].nonzero().squeeze(1)
        ranked = columns[selection.indices]
        keep[row, columns] = False
        keep[row, ranked] = True
        if policy.salient_fraction is not None:
            salient = math.floor(policy.salient_fraction * len(ranked) + 0.5)
            codes[row, ranked[:salient]] = number["visual_salient"]
        if selection.positions is not None:
            position_columns[row, ranked] = columns[selection.positions]
        if selection.features is not None:
            features.append((row, ranked, selection.features))
    if bool((keep == prompt.valid).all()):
        return Reduction(None, codes, features=tuple(features), position_columns=position_columns)
    return _gather(prompt, keep, codes, features, position_columns)


def _gather(
    prompt: Prompt, keep: Tensor, codes: Tensor, features: list[tuple[int, Tensor, Tensor]], positions: Tensor
) -> Reduction:
    """Rows keep what they keep and are padded anew, on the left, to the longest of them."""
    counts = keep.sum(dim=1)
    slots = int(counts.max())
    columns = torch.argsort(keep.to(torch.int8), dim=1, stable=True)[:, keep.shape[1] - slots :]
    real = torch.arange(slots, device="cpu") >= slots - counts[:, None]
    removed = (prompt.valid & ~keep).long()
    before = removed.cumsum(dim=1).gather(1, columns)
    slot_of = torch.zeros_like(codes)
    slot_of.scatter_(1, columns, torch.arange(slots, device="cpu").expand_as(columns))
    moved = tuple((row, slot_of[row, ranked], new) for row, ranked, new in features)
    return Reduction(
        columns=torch.where(real, columns, -1),
        codes=torch.where(real, codes.gather(1, columns), NO_TOKEN),
        dropped_before=torch.where(real, before, 0),
        dropped=removed.sum(dim=1, keepdim=True),
        features=moved,
        position_columns=torch.where(real, positions.gather(1, columns), columns),
    )
