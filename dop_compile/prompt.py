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

from dop_compile.layout import NO_TOKEN
from dop_compile.policy import Policy
from dop_compile.reducers import GivenReducer, Reducer, VisualContext, create, select_tokens

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
    """

    embeds: Tensor
    valid: Tensor
    visual: Tensor
    newline: Tensor
    system: Tensor
    output: Tensor | None = None


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


def _segments(columns: Tensor, visual: Tensor) -> Tensor:
    """Number of the contiguous run of placeholders that each column belongs to: one image, or one video."""
    starts = visual & ~torch.cat([torch.zeros(1, dtype=torch.bool, device="cpu"), visual[:-1]])
    return (starts.cumsum(0) - 1)[columns]


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
    for row in range(keep.shape[0]):
        columns = (prompt.visual[row] & ~prompt.newline[row] & prompt.valid[row]).nonzero().squeeze(1)
        if not len(columns):
            continue
        device = prompt.embeds.device
        others = (prompt.valid[row] & ~prompt.visual[row]).nonzero().squeeze(1).to(device)
        context = VisualContext(
            projected=prompt.embeds[row, columns.to(device)].detach(),
            text=prompt.embeds[row, others].detach(),
            segments=_segments(columns, prompt.visual[row]).to(device),
            sample_index=row,
        )
        selection = select_tokens(reducer, context, _count(policy, reducer, row, len(columns)))
        ranked = columns[selection.indices.cpu()]
        keep[row, columns] = False
        keep[row, ranked] = True
        if policy.salient_fraction is not None:
            salient = math.floor(policy.salient_fraction * len(ranked) + 0.5)
            codes[row, ranked[:salient]] = number["visual_salient"]
        if selection.positions is not None:
            position_columns[row, ranked] = columns[selection.positions.cpu()]
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
