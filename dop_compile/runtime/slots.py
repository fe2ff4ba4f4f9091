"""The decoder's inputs after grouping and reduction: from the caller's columns to the decoder's slots."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dop_compile.errors import UnsupportedUsageError
from dop_compile.policy.keep import KeepTable
from dop_compile.policy.policy import Policy
from dop_compile.runtime.cache import PrunedCache
from dop_compile.runtime.layout import NO_TOKEN, TokenLayout
from dop_compile.runtime.masks import MaskSelector
from dop_compile.runtime.outer_masks import DeferredMask, DeferredMasks
from dop_compile.runtime.program import Program
from dop_compile.runtime.prompt import Prompt, Reduction, call_groups, make_reducer, reduce_prompt
from dop_compile.spans import SELECTION, span
from dop_compile.tokens import Universe
from dop_compile.vision.features import TokenFeatures
from dop_compile.vision.prompt import PromptVision

__all__ = ["Arguments", "Call", "Slots", "token_counts", "visual_positions"]


@dataclass
class Call:
    """What the outer model's forward call tells its decoder; one per call, so that threads do not share it.

    Args:
        tier, policy: what to run.
        rows: number of last rows whose output is wanted; 0 for all.
        prompt_tokens: how many of the new tokens are the prompt's; those after them were generated (group `output`).
            None: all.
        batch: number of rows.
        visual: masks of placeholder positions, noted while the outer model merges features.
        newline: the embedding of newlines inside image placeholders, for models that have one.
        token_groups: the caller's groups for text-only models: 0 text, 1 visual, 2 system.
        given: visual token indices per sample for the reducer "given".
        vision: what was seen of the vision tower, one entry per call of a feature method.
        input_ids: (batch, tokens) of the call, if the caller passed them.
        model: the model's name, for messages.
        first_layer: the layer to begin at.
        stream: (batch, tokens, hidden) residual stream that enters it, if it is not the first one.
        done: whether the outer model has called its decoder.
    """

    tier: str
    policy: Policy
    rows: int = 0
    prompt_tokens: int | None = None
    batch: int = 1
    visual: list[Tensor] = field(default_factory=list)
    newline: Tensor | None = None
    token_groups: Tensor | None = None
    given: Sequence[Any] | None = None
    vision: list[TokenFeatures] = field(default_factory=list)
    input_ids: Tensor | None = None
    model: str = "this model"
    first_layer: int = 0
    stream: Tensor | None = None
    done: bool = False


@dataclass(frozen=True)
class Arguments:
    """A decoder call's arguments after checking.

    Args:
        masks: what the outer model built, if it builds masks.
        packed: features of visual tokens, (their number, hidden) each.
        packed_mask: (batch, tokens) or (batch, tokens, 1) bool, the tokens they belong to.
        packed_name, packed_keys: the argument they came in, and their keys if that was a dictionary.
        token_inputs: other tensors (batch, tokens, ...) by name.
    """

    embeds: Tensor
    attention_mask: Tensor | None
    masks: DeferredMask | DeferredMasks | None
    positions: Tensor | None
    cache: PrunedCache | None
    packed: tuple[Tensor, ...]
    packed_mask: Tensor | None
    constants: tuple[tuple[str, Any], ...]
    packed_name: str = "deepstack_visual_embeds"
    packed_keys: tuple[Any, ...] | None = None
    token_inputs: dict[str, Tensor] = field(default_factory=dict)


def visual_positions(call: Call, embeds: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
    """(batch, tokens) bool masks, on the CPU, of the prompt's visual tokens and of newlines among them."""
    if call.token_groups is not None:
        visual = call.token_groups == 1
    elif call.visual:
        visual = torch.stack([m.any(dim=-1) if m.dim() == 3 else m for m in call.visual]).any(dim=0)
    else:
        visual = torch.zeros(embeds.shape[:2], dtype=torch.bool, device="cpu")
    visual = visual & (torch.arange(embeds.shape[1], device=visual.device) < prompt)
    newline = torch.zeros_like(visual)
    if call.newline is not None and call.visual:
        newline = visual & (embeds == call.newline.to(embeds)).all(dim=-1)
    return visual.cpu(), newline.cpu()


def token_counts(call: Call, embeds: Tensor, prompt: int, mask: Tensor | None) -> tuple[int, int, int]:
    """System, visual and text tokens of a batch of one, padding left out.

    Newlines inside an image, which no policy drops, are text, and so is what stands behind the prompt.
    """
    visual, newline = visual_positions(call, embeds, prompt)
    groups = call.token_groups
    system = (visual.cumsum(1) == 0 if groups is None else groups.cpu() == 2) & visual.any()
    live = torch.ones_like(visual) if mask is None else mask.cpu().bool()
    total, visual_count, system_count = (
        int(part[0].sum()) for part in (live, visual & ~newline & live, system & ~visual & live)
    )
    return system_count, visual_count, total - system_count - visual_count


def _prompt(call: Call, arguments: Arguments) -> Prompt | None:
    """The prompt with its groups; None where all new tokens are of one group, text or output."""
    embeds, mask, cache = arguments.embeds, arguments.attention_mask, arguments.cache
    tokens = embeds.shape[1]
    prompt = tokens if call.prompt_tokens is None else call.prompt_tokens
    if prompt == 0:
        return None
    visual, newline = visual_positions(call, embeds, prompt)
    valid = (
        torch.ones(embeds.shape[:2], dtype=torch.bool, device="cpu") if mask is None else mask[:, -tokens:].bool().cpu()
    )
    visual, newline = visual & valid, newline & valid
    if call.token_groups is not None:
        system = (call.token_groups == 2).cpu() & visual.any(dim=1, keepdim=True) & valid
    else:
        first = cache is None or cache.columns_seen == 0
        seen = visual.long().cumsum(dim=1)
        system = (seen == 0) & visual.any(dim=1, keepdim=True) & valid & first
    if prompt == tokens and not bool((visual | system).any()):
        return None
    output = torch.arange(tokens, device="cpu") >= prompt
    with span(SELECTION) if call.vision else nullcontext():
        vision = None if call.token_groups is not None else PromptVision(call.vision, call.visual, embeds, call.model)
    return Prompt(embeds, valid, visual, newline, system, output, vision, call.input_ids)


class Slots:
    """The decoder's inputs after reduction.

    Args:
        call, arguments: of the decoder's forward.
        reduction: what the reducer has left of the prompt; None where all new tokens are of one group.
        groups: token groups that the call contains.
        newline: (batch, tokens) bool, on the CPU: newline embeddings inside images; None where there is no prompt.

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
    ):
        self.call, self.arguments, self.cache = call, arguments, arguments.cache
        self.device = arguments.embeds.device
        self.batch, self.tokens = arguments.embeds.shape[:2]
        self.reduction = reduction
        self.keep = KeepTable.from_policy(call.policy, groups)
        self._groups, self._newline = groups, newline
        columns = reduction.columns if reduction is not None else None
        self.columns = None if columns is None else columns.to(self.device)
        self.count = self.tokens if columns is None else columns.shape[1]
        if self.count == 0:
            raise ValueError("every token of the prompt was removed: a prompt needs text besides its images")

    @classmethod
    def of(cls, call: Call, arguments: Arguments) -> Slots:
        """Group the tokens of a call and reduce the visual ones."""
        prompt = _prompt(call, arguments)
        if prompt is None:
            return cls(call, arguments, None, ("output",) if call.prompt_tokens == 0 else ("text",), None)
        batch = arguments.embeds.shape[0]
        reducer = make_reducer(call.policy, call.given, batch) if bool(prompt.visual.any()) else None
        with span(SELECTION) if reducer is not None else nullcontext():
            reduction = reduce_prompt(prompt, call.policy, reducer)
        ranked = call.policy.ranking.groups if call.policy.ranking is not None else ()
        found = {g for i, g in enumerate(call_groups(call.policy)) if bool((reduction.codes == i).any())}
        found |= set(ranked) if "visual" in found else set()
        groups = tuple(g for g in call_groups(call.policy) if g in found)
        return cls(call, arguments, reduction, groups, prompt.newline)

    def layout(self) -> TokenLayout:
        """Where tokens of each set stand; the codes refer to the program's own groups."""
        codes, valid = self._codes()
        requested = self._requested(valid)
        groups = self.keep.groups
        if requested is None:
            universe = Universe(groups)
            requested = torch.ones_like(codes, dtype=torch.bool)
        else:
            wanted = frozenset(g for i, g in enumerate(groups) if bool(((codes == i) & requested).any()))
            if "visual" in wanted and self.keep.ranking is not None:
                wanted |= set(self.keep.ranking.groups)
            universe = Universe(groups, wanted)
        return TokenLayout(universe, codes, requested, self.device)

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
        mask = self.arguments.attention_mask
        if mask is not None and self.count > 1:
            codes = torch.where(mask[:, -self.count :].bool().cpu(), codes, NO_TOKEN)
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
                embeds[row, slots.to(self.device)] = features.to(embeds)
        return embeds

    def positions(self) -> Tensor:
        """Position ids of the slots: the caller's, with removed tokens skipped (original) or closed up (compact)."""
        positions = self.arguments.positions
        seen = self.cache.columns_seen if self.cache is not None else 0
        if positions is None:
            positions = torch.arange(seen, seen + self.tokens, device=self.device)[None]
        shift = self.cache.position_shift if self.cache is not None else None
        reduction = self.reduction
        take = None if reduction is None else reduction.position_columns
        if (self.columns is None and take is None) and shift is None and self.keep.is_dense:
            return positions
        positions = positions.expand(*positions.shape[:-2], self.batch, self.tokens)
        if take is not None:
            index = take.to(self.device).clamp(min=0)
            positions = positions.gather(-1, index.expand(*positions.shape[:-2], -1, -1))
        if self.call.policy.positions == "compact":
            if positions.dim() != 2:
                raise UnsupportedUsageError(
                    "positions='compact' is not defined for a model with multi-axis rotary positions (M-RoPE); use "
                    "positions='original'"
                )
            if shift is not None:
                positions = positions - shift
            if reduction is not None and reduction.dropped_before is not None:
                positions = positions - reduction.dropped_before.to(self.device)
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
        if self.call.policy.positions == "compact" and self.reduction is not None:
            dropped = self.reduction.dropped
            if dropped is not None:
                dropped = dropped.to(self.device)
                cache.position_shift = dropped if cache.position_shift is None else cache.position_shift + dropped
        entries = {layer: selector.entries(layer, keys) for layer, keys in program.layer_keys.items()}
        cache.commit(self.tokens, self.count, self.columns, {**cache.entries, **entries})
