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

import numpy as np
import torch
from torch import Tensor

from dop_compile.errors import UnsupportedUsageError
from dop_compile.policy.policy import Policy
from dop_compile.reducers import GivenReducer, Reducer, VisualContext, create, needs, select_batch
from dop_compile.runtime.layout import NO_TOKEN, Bools, Ints
from dop_compile.transfer import to_device
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


def _segments(columns: Ints, visual: Bools, items: Ints | None) -> Ints:
    """Number, from 0 in order of appearance, of the image or video that each column belongs to.

    Where the row's `items` (tokens,) are -1 or None, a contiguous run of placeholders is taken for one.
    """
    items = np.full(visual.shape, -1) if items is None else items
    unknown = visual & (items < 0)
    starts = unknown & ~np.concatenate([[False], unknown[:-1]])
    numbers = np.where(unknown, items.max() + starts.cumsum(), items)
    _, first, own = np.unique(numbers[columns], return_index=True, return_inverse=True)
    ranks: Ints = first.argsort().argsort()[own]
    return ranks


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
    text = (prompt.valid & ~prompt.visual).numpy()
    if prompt.output is not None:
        text = text & ~prompt.output.numpy()
    known = vision.items if prompt.items is None and vision is not None else prompt.items
    items, visual, places = None if known is None else known.numpy(), prompt.visual.numpy(), counted.numpy()
    rows = np.flatnonzero(places.any(axis=1)).tolist()
    taken = _rows(prompt.embeds, [places[rows], text[rows]], rows, getattr(reducer, "reads_values", True))
    contexts = []
    for row, projected, others in zip(rows, *taken, strict=True):
        own = np.flatnonzero(places[row])
        columns = torch.from_numpy(own)
        segments = torch.from_numpy(_segments(own, visual[row], None if items is None else items[row]))
        fields: dict[str, Any] = {}
        if vision is not None:
            fields = vision.fields(row, columns, segments, wanted)
        elif "tiles" in wanted:  # tokens that the caller calls visual are of no tiles
            fields = {"tiles": torch.zeros_like(columns)}
        if "text_ids" in wanted and prompt.input_ids is not None:
            places_of_text = to_device([np.flatnonzero(text[row])], prompt.input_ids.device)[0]
            fields["text_ids"] = prompt.input_ids[row, places_of_text]
        before = int(text[row, : own[0]].sum())
        contexts.append(VisualContext(projected, others, segments, row, instruction_start=before, **fields))
    return contexts


def _rows(embeds: Tensor, masks: Sequence[Bools], rows: list[int], read: bool) -> list[list[Tensor]]:
    """The embeddings under each mask (rows, tokens), by row; of no width where they are not to be read."""
    counts = [mask.sum(axis=1).tolist() for mask in masks]
    if not read:
        return [[torch.empty(count, 0, device="cpu") for count in own] for own in counts]
    firsts = np.array(rows, dtype=np.int64)[:, None] * embeds.shape[1]
    flat = [(firsts + np.arange(embeds.shape[1]))[mask] for mask in masks]
    stream = embeds.flatten(0, 1)
    taken = [stream[index] for index in to_device(flat, embeds.device)]
    return [list(torch.split(values, own)) for values, own in zip(taken, counts, strict=True)]


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
    valid, visual = prompt.valid.numpy(), prompt.visual.numpy()
    codes = np.full(valid.shape, number["text"])
    codes[prompt.system.numpy()] = number["system"]
    if prompt.output is not None:
        codes[:, prompt.output.numpy()] = number["output"]
    codes[visual] = number.get("visual", number.get("visual_rest", -1))
    codes[~valid] = NO_TOKEN
    if reducer is None:
        return Reduction(None, torch.from_numpy(codes))
    keep = valid.copy()
    position_columns = np.tile(np.arange(keep.shape[1]), (keep.shape[0], 1))
    features: list[tuple[int, Tensor, Tensor]] = []
    counted = prompt.visual & ~prompt.newline & prompt.valid
    contexts = _contexts(prompt, counted, reducer)
    counts = [_count(policy, reducer, context.sample_index, context.tokens) for context in contexts]
    for context, selection in zip(contexts, select_batch(reducer, contexts, counts), strict=True):
        row = context.sample_index
        columns = np.flatnonzero(counted[row].numpy())
        ranked = columns[selection.indices.numpy()]
        keep[row, columns] = False
        keep[row, ranked] = True
        if policy.salient_fraction is not None:
            salient = math.floor(policy.salient_fraction * len(ranked) + 0.5)
            codes[row, ranked[:salient]] = number["visual_salient"]
        if selection.positions is not None:
            position_columns[row, ranked] = columns[selection.positions.numpy()]
        if selection.features is not None:
            features.append((row, torch.from_numpy(ranked), selection.features))
    if bool((keep == valid).all()):
        places = torch.from_numpy(position_columns)
        return Reduction(None, torch.from_numpy(codes), features=tuple(features), position_columns=places)
    return _gather(valid, keep, codes, features, position_columns)


def _gather(
    valid: Bools, keep: Bools, codes: Ints, features: list[tuple[int, Tensor, Tensor]], positions: Ints
) -> Reduction:
    """Rows keep what they keep and are padded anew, on the left, to the longest of them."""
    counts = keep.sum(axis=1)
    slots = int(counts.max())
    columns = np.argsort(keep, axis=1, kind="stable")[:, keep.shape[1] - slots :]
    real = np.arange(slots) >= slots - counts[:, None]
    rows = np.arange(len(keep))[:, None]
    removed = valid & ~keep
    slot_of = np.zeros(keep.shape, dtype=np.int64)
    slot_of[rows, columns] = np.arange(slots)
    moved = tuple((row, torch.from_numpy(slot_of[row, ranked.numpy()]), new) for row, ranked, new in features)
    return Reduction(
        columns=torch.from_numpy(np.where(real, columns, -1)),
        codes=torch.from_numpy(np.where(real, codes[rows, columns], NO_TOKEN)),
        dropped_before=torch.from_numpy(np.where(real, removed.cumsum(axis=1)[rows, columns], 0)),
        dropped=torch.from_numpy(removed.sum(axis=1, keepdims=True)),
        features=moved,
        position_columns=torch.from_numpy(np.where(real, positions[rows, columns], columns)),
    )
