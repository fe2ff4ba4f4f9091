"""The decoder's inputs after grouping and reduction: from the caller's columns to the decoder's slots."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from dop_compile.errors import UnsupportedUsageError
from dop_compile.policy.keep import KeepTable
from dop_compile.runtime.call import Arguments, Call
from dop_compile.runtime.layout import NO_TOKEN, TokenLayout
from dop_compile.runtime.masks import MaskSelector
from dop_compile.runtime.program import Program
from dop_compile.runtime.prompt import Reduction, call_groups, make_reducer, reduce_prompt
from dop_compile.runtime.token_kinds import read_prompt
from dop_compile.spans import SELECTION, span
from dop_compile.tokens import Universe
from dop_compile.transfer import to_device

__all__ = ["Slots"]

_MOVED = ("columns", "position_columns", "dropped_before", "dropped")
"""What the device has to know of a reduction."""


class Slots:
    """The decoder's inputs after reduction.

    Args:
        call, arguments: of the decoder's forward.
        reduction: what the reducer has left of the prompt; None where all new tokens are of one group.
        groups: token groups that the call contains.
        newline: (batch, tokens) bool, on the CPU: newline embeddings inside images; None where there is no prompt.
        valid: (batch, tokens) bool, on the CPU: no padding; None where that is not known.

    Raises:
        ValueError: no token is left.
    """

    def __init__(
        self,
        call: Call,
        arguments: Arguments,
        reduction: Reduction | None,
        groups: tuple[str, ...],
        newline: Tensor | None,
        valid: Tensor | None = None,
    ):
        self.call, self.arguments, self.cache = call, arguments, arguments.cache
        self.device = arguments.embeds.device
        self.batch, self.tokens = arguments.embeds.shape[:2]
        self.reduction = reduction
        self.keep = KeepTable.from_policy(call.policy, groups)
        self._groups, self._newline, self._valid = groups, newline, valid
        self._sent: dict[str, Tensor] = {}
        if reduction is not None:
            moved = {name: getattr(reduction, name) for name in _MOVED if getattr(reduction, name) is not None}
            there = to_device([value.numpy() for value in moved.values()], self.device)
            self._sent = dict(zip(moved, there, strict=True))
        columns = reduction.columns if reduction is not None else None
        self.columns = self._sent.get("columns")
        self.count = self.tokens if columns is None else columns.shape[1]
        if self.count == 0:
            raise ValueError("every token of the prompt was removed: a prompt needs text besides its images")

    @property
    def has_gaps(self) -> bool:
        """Whether the reduction has left rows of different lengths."""
        columns = self.reduction.columns if self.reduction is not None else None
        return columns is not None and bool((columns < 0).any())

    @classmethod
    def of(cls, call: Call, arguments: Arguments) -> Slots:
        """Group the tokens of a call and reduce the visual ones."""
        prompt, valid = read_prompt(call, arguments)
        if prompt is None:
            return cls(call, arguments, None, ("output",) if call.prompt_tokens == 0 else ("text",), None, valid)
        batch = arguments.embeds.shape[0]
        reducer = make_reducer(call.policy, call.given, batch) if bool(prompt.visual.any()) else None
        with span(SELECTION) if reducer is not None else nullcontext():
            reduction = reduce_prompt(prompt, call.policy, reducer)
        ranked = call.policy.ranking.groups if call.policy.ranking is not None else ()
        numbers = set(np.unique(reduction.codes.numpy()).tolist())
        found = {g for i, g in enumerate(call_groups(call.policy)) if i in numbers}
        found |= set(ranked) if "visual" in found else set()
        groups = tuple(g for g in call_groups(call.policy) if g in found)
        return cls(call, arguments, reduction, groups, prompt.newline, valid)

    def layout(self) -> TokenLayout:
        """Where tokens of each set stand; the codes refer to the program's own groups."""
        codes, valid = self._codes()
        requested = self._requested(valid)
        groups = self.keep.groups
        if requested is None:
            universe = Universe(groups)
            requested = torch.ones_like(codes, dtype=torch.bool)
        else:
            numbers = set(np.unique(codes.numpy()[requested.numpy()]).tolist())
            wanted = frozenset(g for i, g in enumerate(groups) if i in numbers)
            if "visual" in wanted and self.keep.ranking is not None:
                wanted |= set(self.keep.ranking.groups)
            universe = Universe(groups, wanted)
        make = TokenLayout.kept if self.keep.ranking is None else TokenLayout
        return make(universe, codes, requested, self.device)

    def _codes(self) -> tuple[Tensor, Tensor]:
        shape = (self.batch, self.count)
        if self.reduction is not None:
            codes = self.reduction.codes
            if not self.keep.is_dense:
                table = [self._groups.index(g) if g in self._groups else 0 for g in call_groups(self.call.policy)]
                codes = torch.where(codes == NO_TOKEN, NO_TOKEN, torch.tensor(table, device="cpu")[codes.clamp(min=0)])
            else:
                codes = torch.where(codes == NO_TOKEN, NO_TOKEN, 0)
            return codes, codes != NO_TOKEN
        codes = torch.zeros(shape, dtype=torch.long, device="cpu")
        mask, valid = self.arguments.attention_mask, self._valid
        if mask is not None and self.count > 1:
            valid = mask[:, -self.count :].bool().cpu() if valid is None else valid
            codes = torch.where(valid, codes, NO_TOKEN)
        return codes, codes != NO_TOKEN

    def _requested(self, valid: Tensor) -> Tensor | None:
        """(batch, slots) bool: slots whose output row the caller wants; None for all."""
        if self.call.rows == 0 or self.call.rows >= self.tokens:
            return None
        columns = torch.arange(self.tokens, device="cpu").expand(self.batch, -1)
        if self.reduction is not None and self.reduction.columns is not None:
            columns = self.reduction.columns
        return (columns >= self.tokens - self.call.rows) & valid

    # --- decoder inputs -------------------------------------------------------------------------------------------

    def embeds(self) -> Tensor:
        embeds = self.arguments.embeds
        if self.columns is not None:
            embeds = embeds.gather(1, self.columns.clamp(min=0)[..., None].expand(-1, -1, embeds.shape[-1]))
        if self.reduction is not None and self.reduction.features:
            embeds = embeds.clone()
            for row, slots, features in self.reduction.features:
                embeds[row, to_device([slots.numpy()], self.device)[0]] = features.to(embeds)
        return embeds

    def positions(self) -> Tensor:
        """Position ids of the slots: the caller's, with removed tokens skipped (original) or closed up (compact)."""
        positions = self.arguments.positions
        seen = self.cache.columns_seen if self.cache is not None else 0
        if positions is None:
            positions = torch.arange(seen, seen + self.tokens, device=self.device)[None]
        shift = self.cache.position_shift if self.cache is not None else None
        take = self._sent.get("position_columns")
        if (self.columns is None and take is None) and shift is None and self.keep.is_dense:
            return positions
        positions = positions.expand(*positions.shape[:-2], self.batch, self.tokens)
        if take is not None:
            index = take.clamp(min=0)
            positions = positions.gather(-1, index.expand(*positions.shape[:-2], -1, -1))
        if self.call.policy.positions == "compact":
            if positions.dim() != 2:
                raise UnsupportedUsageError(
                    "positions='compact' is not defined for a model with multi-axis rotary positions (M-RoPE); use "
                    "positions='original'"
                )
            if shift is not None:
                positions = positions - shift
            if "dropped_before" in self._sent:
                positions = positions - self._sent["dropped_before"]
        return positions.clamp(min=0) if self.columns is not None else positions.contiguous()

    def all_columns(self) -> Tensor | None:
        """(batch, past + new slots) caller's column of each slot, -1 for padding; None where column i is slot i."""
        return self.columns if self.cache is None else self.cache.all_columns(self.count, self.columns)

    def attention_mask(self) -> Tensor | None:
        """(batch, past + new slots) padding mask; None where no slot is padding."""
        mask, columns = self.arguments.attention_mask, self.all_columns()
        if columns is None:
            return mask
        real = columns >= 0
        if mask is not None:
            real = real & mask.bool().gather(1, columns.clamp(min=0))
        return real.long()

    def packed(self) -> tuple[Tensor | None, list[Tensor]]:
        """DeepStack: the mask of visual slots, and the features of those that were kept."""
        mask, features = self.arguments.packed_mask, list(self.arguments.packed)
        if not features or mask is None or self.columns is None:
            return mask, features
        flat = mask.reshape(self.batch, self.tokens)
        number = (flat.flatten().cumsum(0) - 1).view_as(flat)
        columns = self.columns.clamp(min=0)
        kept = flat.gather(1, columns) & (self.columns >= 0)
        rows = number.gather(1, columns)[kept]
        return kept.view(*kept.shape, *mask.shape[2:]), [feature[rows] for feature in features]

    def newlines(self) -> Tensor:
        """(batch, slots) bool, on the CPU: newline embeddings inside images, which nothing drops."""
        if self._newline is None:
            return torch.zeros(self.batch, self.count, dtype=torch.bool, device="cpu")
        if self.reduction is None or self.reduction.columns is None:
            return self._newline
        columns = self.reduction.columns
        return self._newline.gather(1, columns.clamp(min=0)) & (columns >= 0)

    def token_inputs(self) -> dict[str, Tensor]:
        """The other values per token, of the slots' tokens."""
        if self.columns is None:
            return self.arguments.token_inputs
        rows = torch.arange(self.batch, device=self.device)[:, None]
        return {name: value[rows, self.columns.clamp(min=0)] for name, value in self.arguments.token_inputs.items()}

    def commit(self, program: Program, selector: MaskSelector) -> None:
        cache = self.cache
        if cache is None:
            return
        cache.tier, cache.policy = self.call.tier, self.call.policy
        if self.call.policy.positions == "compact":
            dropped = self._sent.get("dropped")
            if dropped is not None:
                cache.position_shift = dropped if cache.position_shift is None else cache.position_shift + dropped
        entries = {layer: selector.entries(layer, *sets) for layer, sets in program.layer_keys.items()}
        cache.commit(self.tokens, self.count, self.columns, {**cache.entries, **entries})
