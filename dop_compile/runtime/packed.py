"""Packed rows: several samples in one row, told by positions that do not go on by one.

Hugging Face's mask builders keep such samples apart where a call has neither a padding mask nor a cache, by looking at
its positions. After token reduction those have gaps and tell nothing. So a pruned model takes packed rows apart: each
sample is a row of its own in the decoder, padded on the left, and goes back to its place behind it. Its groups, budget,
ranking, windows and positions are then what they are for the sample alone. A policy that prunes nothing leaves the row
as it is, under the model's own mask.

Refused: packed rows where the original's masks, or the states of its recurrent layers, would let samples see each
other, and those with a cache.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dop_compile.errors import UnsupportedUsageError
from dop_compile.hf.mixers import is_mixer
from dop_compile.policy.keep import KeepTable
from dop_compile.policy.policy import Policy
from dop_compile.reducers import GivenReducer
from dop_compile.runtime.call import Arguments, Call
from dop_compile.runtime.outer_masks import positions_of_masks
from dop_compile.runtime.prompt import call_groups
from dop_compile.runtime.token_kinds import visual_positions

__all__ = ["PackedRows", "packed_rows"]

REMEDY = "pass the samples as rows of a padded batch, or use_cache=False and no attention_mask"


def packed_rows(decoder: nn.Module, call: Call, arguments: Arguments) -> PackedRows | None:
    """How to take a call's rows apart; None where they hold one sample each, or where the policy prunes nothing.

    Raises:
        UnsupportedUsageError: the rows are packed, and the original would let samples see each other; or, later, what
            the arguments' `refusals` say.
    """
    positions, cache = arguments.positions, arguments.cache
    batch, tokens = arguments.embeds.shape[:2]
    is_later = cache is not None and cache.columns_seen > 0
    if positions is None or arguments.attention_mask is not None or tokens == 1 or is_later or not _prunes(call.policy):
        return None
    told: Tensor | None = None
    if arguments.masks is not None:
        told = arguments.masks.positions
    elif cache is None and not _goes_on(positions):
        constants = dict(arguments.constants)
        given = {"inputs_embeds": arguments.embeds, "position_ids": positions, "use_cache": False}
        with torch.no_grad():
            told = positions_of_masks(decoder, **{**constants, **arguments.token_inputs, **given})
    if told is None:
        text = positions if positions.dim() == 2 else positions[0]  # of several axes the first is text, or time
        reason = (
            "position_ids begin anew within a row, as those of several samples in one row do; with a cache, or "
            f"where the masks of {type(decoder).__name__} do not read them, samples cannot be kept apart: {REMEDY}"
        )
        arguments.refusals.append(((text.diff(dim=-1) < 0).any(), reason))
        return None
    if _goes_on(told):
        return None
    if any(map(is_mixer, decoder.modules())):
        raise UnsupportedUsageError(
            f"rows of several samples (position_ids begin anew) run into each other in the recurrent or convolutional "
            f"layers of {type(decoder).__name__}, whose states go on over their borders; pass the samples as rows of a "
            "padded batch"
        )
    if cache is not None:
        raise UnsupportedUsageError(f"rows of several samples (position_ids begin anew) cannot be cached; {REMEDY}")
    if call.prompt_tokens not in (None, tokens):
        raise UnsupportedUsageError(f"generate cannot go on from rows of several samples; {REMEDY}")
    starts = told.diff(dim=-1) != 1
    return PackedRows(torch.nn.functional.pad(starts, (1, 0), value=True).expand(batch, -1))


def _goes_on(positions: Tensor) -> bool:
    return bool((positions.diff(dim=-1) == 1).all())


def _prunes(policy: Policy) -> bool:
    reduces = policy.visual_tokens is not None or policy.salient_fraction is not None or policy.reducer == "given"
    return reduces or not KeepTable.from_policy(policy, call_groups(policy)).is_dense


class PackedRows:
    """Rows and their samples.

    Args:
        starts: (batch, tokens) bool, the first token of each sample.
    """

    def __init__(self, starts: Tensor):
        self._shape = starts.shape
        tokens = starts.shape[1]
        firsts = starts.flatten().nonzero()[:, 0].tolist()
        lengths = [end - first for first, end in pairwise([*firsts, starts.numel()])]
        self._samples = [first // tokens for first in firsts]  # the row of each
        longest, device = max(lengths), starts.device
        padding = torch.tensor([longest - length for length in lengths], device=device)[:, None]
        places = torch.arange(longest, device=device) - padding
        self._valid = places >= 0
        self._flat = (torch.tensor(firsts, device=device)[:, None] + places).clamp(min=0)

    def apart(self, call: Call, arguments: Arguments) -> tuple[Call, Arguments]:
        """The call with a row for every sample."""
        given = None if call.given is None else self._given(call, arguments)
        split_call = replace(
            call,
            rows=0,
            prompt_tokens=None,
            batch=len(self._samples),
            visual=[self._rows(mask) for mask in call.visual],
            token_groups=None if call.token_groups is None else self._rows(call.token_groups),
            given=given,
            input_ids=None if call.input_ids is None else self._rows(call.input_ids),
            stream=None if call.stream is None else self._rows(call.stream),
        )
        embeds, mask, masks = self._rows(arguments.embeds), self._valid.long(), arguments.masks
        flat = self._flat
        return split_call, replace(
            arguments,
            embeds=embeds,
            attention_mask=mask,
            masks=None if masks is None else masks.of_rows(flat // self._shape[1], flat % self._shape[1], embeds, mask),
            positions=None if arguments.positions is None else self._positions(arguments.positions),
            packed_mask=None if arguments.packed_mask is None else self._rows(arguments.packed_mask),
            token_inputs={name: self._rows(value) for name, value in arguments.token_inputs.items()},
        )

    def together(self, rows: Tensor) -> Tensor:
        """(batch, tokens, ...) from a row for every sample."""
        return rows[self._valid.to(rows.device)].view(*self._shape, *rows.shape[2:])

    def _rows(self, values: Tensor) -> Tensor:
        """(samples, longest, ...) from (batch, tokens, ...), zeros for padding."""
        flat, valid = self._flat.to(values.device), self._valid.to(values.device)
        taken = values.expand(self._shape[0], *values.shape[1:]).flatten(0, 1)[flat]
        return taken.masked_fill(~valid.view(*valid.shape, *[1] * (values.dim() - 2)), 0)

    def _positions(self, positions: Tensor) -> Tensor:
        if positions.dim() == 2:
            return self._rows(positions)
        return torch.stack([self._rows(axis) for axis in positions])

    def _given(self, call: Call, arguments: Arguments) -> list[Any]:
        """Indices of visual tokens for every sample; the caller's may be for every row."""
        indices = GivenReducer(call.given or ()).indices
        if len(indices) == len(self._samples):
            return list(indices)
        if len(indices) != self._shape[0]:
            raise ValueError(
                f"visual_indices are for {len(indices)} samples, but the batch has {self._shape[0]} rows with "
                f"{len(self._samples)} samples"
            )
        visual, newline = visual_positions(call, arguments.embeds, self._shape[1])
        counts = (self._rows(visual & ~newline)).sum(dim=1).tolist()
        split: list[list[int]] = []
        before = 0
        for number, (row, count) in enumerate(zip(self._samples, counts, strict=True)):
            if number == 0 or self._samples[number - 1] != row:
                before = 0
            is_last = number + 1 == len(self._samples) or self._samples[number + 1] != row
            end = before + count
            split.append([index - before for index in indices[row] if before <= index and (is_last or index < end)])
            before = end
        return split
