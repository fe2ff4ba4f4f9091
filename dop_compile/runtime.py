"""One forward call of a compiled decoder: group, reduce, pick the program, run it, put rows where the caller wants them.

inputs_embeds --groups--> codes --reduce--> slots --program--> rows of requested slots --scatter--> caller's rows
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dop_compile.cache import PrunedCache, ReducedView
from dop_compile.errors import UnsupportedUsageError
from dop_compile.keep import KeepTable
from dop_compile.layout import NO_TOKEN, TokenLayout
from dop_compile.masks import MaskSelector
from dop_compile.outer_masks import DeferredMask
from dop_compile.policy import Policy
from dop_compile.program import Program
from dop_compile.prompt import Prompt, Reduction, make_reducer, reduce_prompt
from dop_compile.tokens import TokenSet, Universe
from dop_compile.trace import DecoderInputs

__all__ = ["Call", "run_decoder"]

PACKED_INPUT, PACKED_MASK = "deepstack_visual_embeds", "visual_pos_masks"
REFUSED_OUTPUTS = ("output_attentions", "output_hidden_states")


@dataclass
class Call:
    """What the outer model's forward call tells its decoder; one per call, so that threads do not share it.

    Args:
        tier, policy: what to run.
        rows: number of last rows whose output is wanted; 0 for all.
        generated: whether the new tokens were generated (group `output`).
        visual: masks of placeholder positions, noted while the outer model merges features.
        newline: the embedding of newlines inside image placeholders, for models that have one.
        token_groups: the caller's groups for text-only models: 0 text, 1 visual, 2 system.
        given: visual token indices per sample for the reducer "given".
    """

    tier: str
    policy: Policy
    rows: int = 0
    generated: bool = False
    visual: list[Tensor] = field(default_factory=list)
    newline: Tensor | None = None
    token_groups: Tensor | None = None
    given: Sequence[Any] | None = None


@dataclass(frozen=True)
class _Arguments:
    """A decoder call's arguments after checking; `masks` is what the outer model built, if it builds masks."""

    embeds: Tensor
    attention_mask: Tensor | None
    masks: DeferredMask | None
    positions: Tensor | None
    cache: PrunedCache | None
    packed: tuple[Tensor, ...]
    packed_mask: Tensor | None
    constants: tuple[tuple[str, Any], ...]


def _check_arguments(decoder: nn.Module, call: Call, kwargs: dict[str, Any]) -> _Arguments:
    kwargs = dict(kwargs)
    for name in REFUSED_OUTPUTS:
        if kwargs.pop(name, None) or getattr(decoder.config, name, False):
            raise UnsupportedUsageError(
                f"{name}=True is not supported by a compiled model: pruned operations have no such output; "
                "use the original model for it"
            )
    kwargs.pop("return_dict", None)
    input_ids, embeds = kwargs.pop("input_ids", None), kwargs.pop("inputs_embeds", None)
    if (input_ids is None) == (embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    if embeds is None:
        embeds = decoder.get_input_embeddings()(input_ids)
    if embeds.shape[1] == 0:
        raise ValueError("the prompt is empty: input_ids must hold at least one token per row")
    use_cache = kwargs.pop("use_cache", None)
    use_cache = getattr(decoder.config, "use_cache", True) if use_cache is None else use_cache
    cache = kwargs.pop("past_key_values", None)
    if cache is not None:
        cache = PrunedCache.adopt(cache)
    elif use_cache:
        cache = PrunedCache()
    mask, masks = kwargs.pop("attention_mask", None), None
    if isinstance(mask, DeferredMask):
        mask, masks = mask.attention_mask, mask
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise UnsupportedUsageError(
            "attention_mask must be (batch, tokens), 1 for tokens and 0 for padding; masks prepared by the caller "
            "cannot follow token reduction"
        )
    packed = kwargs.pop(PACKED_INPUT, None) or ()
    arguments = _Arguments(
        embeds,
        mask,
        masks,
        kwargs.pop("position_ids", None),
        cache,
        tuple(packed),
        kwargs.pop(PACKED_MASK, None),
        tuple(sorted((name, value) for name, value in kwargs.items() if value is not None)),
    )
    for name, value in arguments.constants:
        if not isinstance(value, bool | int | float | str):
            raise UnsupportedUsageError(f"{name}={type(value).__name__} is not supported by a compiled model")
    _check_past(call, arguments)
    return arguments


def _check_past(call: Call, arguments: _Arguments) -> None:
    cache, mask = arguments.cache, arguments.attention_mask
    if cache is None:
        return
    if cache.columns_seen and cache.tier is not None and cache.policy != call.policy:
        raise UnsupportedUsageError(
            f"this conversation was begun under tier {cache.tier!r}; it cannot go on under {call.tier!r}, because "
            "its cache holds only what that policy keeps. Pass the same tier, or start a new conversation"
        )
    columns = cache.columns_seen + arguments.embeds.shape[1]
    if mask is not None and cache.columns is not None and mask.shape[1] != columns:
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} tokens; with {cache.columns_seen} tokens in the cache and "
            f"{arguments.embeds.shape[1]} new ones it must cover {columns}"
        )


def _visual_positions(call: Call, embeds: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(batch, tokens) bool masks, on the CPU, of visual tokens and of newlines among them; None without any."""
    if call.token_groups is not None:
        groups = call.token_groups
        if groups.shape != embeds.shape[:2]:
            raise ValueError(f"token_groups is {tuple(groups.shape)}, the prompt is {tuple(embeds.shape[:2])}")
        visual = groups == 1
    elif call.visual:
        visual = torch.stack([m.any(dim=-1) if m.dim() == 3 else m for m in call.visual]).any(dim=0)
    else:
        return None, None
    newline = torch.zeros_like(visual)
    if call.newline is not None:
        newline = visual & (embeds == call.newline.to(embeds)).all(dim=-1)
    visual = visual.cpu()
    return (visual, newline.cpu()) if bool(visual.any()) else (None, None)


def _prompt(call: Call, arguments: _Arguments, visual: Tensor, newline: Tensor) -> Prompt:
    embeds, mask, cache = arguments.embeds, arguments.attention_mask, arguments.cache
    tokens = embeds.shape[1]
    valid = torch.ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask[:, -tokens:].bool().cpu()
    visual, newline = visual & valid, newline & valid
    if call.token_groups is not None:
        system = (call.token_groups == 2).cpu() & valid
    else:
        first = cache is None or cache.columns_seen == 0
        seen = visual.long().cumsum(dim=1)
        system = (seen == 0) & visual.any(dim=1, keepdim=True) & valid & first
    return Prompt(embeds, valid, visual, newline, system)


class _Slots:
    """The decoder's inputs after reduction."""

    def __init__(self, call: Call, arguments: _Arguments):
        self.call, self.arguments, self.cache = call, arguments, arguments.cache
        self.device = arguments.embeds.device
        self.batch, self.tokens = arguments.embeds.shape[:2]
        visual, newline = _visual_positions(call, arguments.embeds)
        self.reduction: Reduction | None = None
        if visual is not None and newline is not None:
            prompt = _prompt(call, arguments, visual, newline)
            reducer = make_reducer(call.policy, call.given, self.batch)
            self.reduction = reduce_prompt(prompt, call.policy, reducer)
            groups = tuple(g for i, g in enumerate(call.policy.groups) if bool((self.reduction.codes == i).any()))
            self.keep = KeepTable.from_policy(call.policy, groups)
        else:
            groups = ("output",) if call.generated else ("text",)
            self.keep = KeepTable.from_policy(call.policy, groups)
        self._groups = groups
        columns = self.reduction.columns if self.reduction is not None else None
        self.columns = None if columns is None else columns.to(self.device)
        self.count = self.tokens if columns is None else columns.shape[1]
        if self.count == 0:
            raise ValueError("every token of the prompt was removed: a prompt needs text besides its images")

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
            universe = Universe(groups, wanted)
        return TokenLayout(universe, codes, requested, self.device)

    def _codes(self) -> tuple[Tensor, Tensor]:
        shape = (self.batch, self.count)
        if self.reduction is not None:
            codes = self.reduction.codes
            if not self.keep.is_dense:
                table = [self._groups.index(g) if g in self._groups else 0 for g in self.call.policy.groups]
                codes = torch.where(codes == NO_TOKEN, NO_TOKEN, torch.tensor(table)[codes.clamp(min=0)])
            else:
                codes = torch.where(codes == NO_TOKEN, NO_TOKEN, 0)
            return codes, codes != NO_TOKEN
        codes = torch.zeros(shape, dtype=torch.long)
        mask = self.arguments.attention_mask
        if mask is not None and self.count > 1:
            codes = torch.where(mask[:, -self.count :].bool().cpu(), codes, NO_TOKEN)
        return codes, codes != NO_TOKEN

    def _requested(self, valid: Tensor) -> Tensor | None:
        """(batch, slots) bool: slots whose output row the caller wants; None for all."""
        if self.call.rows == 0 or self.call.rows >= self.tokens:
            return None
        columns = torch.arange(self.tokens).expand(self.batch, -1)
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

    def attention_mask(self) -> Tensor | None:
        """(batch, past + new slots) padding mask; None where no slot is padding."""
        mask, cache = self.arguments.attention_mask, self.cache
        if cache is not None:
            columns = cache.all_columns(self.count, self.columns)
        else:
            columns = self.columns
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
        number = (mask.flatten().cumsum(0) - 1).view_as(mask)
        columns = self.columns.clamp(min=0)
        kept = mask.gather(1, columns) & (self.columns >= 0)
        rows = number.gather(1, columns)[kept]
        return kept, [feature[rows] for feature in features]

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


def run_decoder(compiled: Any, decoder: nn.Module, call: Call, **kwargs: Any) -> Any:
    """The forward of a compiled model's decoder.

    Args:
        compiled: the model's `CompiledState`: its programs by keep table.
        decoder: the text decoder (this call's copy; weights shared).
        call: what the outer model's call asked for.
        kwargs: what the outer model passes to its decoder.

    Returns:
        the decoder's own output class; `last_hidden_state` is (batch, rows, hidden) for `rows` last rows, else
        (batch, tokens, hidden) in the caller's columns.
    """
    arguments = _check_arguments(decoder, call, kwargs)
    slots = _Slots(call, arguments)
    layout = slots.layout()
    positions, cache, packed = slots.positions(), slots.cache, slots.packed()
    past = cache.slots_seen if cache is not None else 0
    view = ReducedView(past) if cache is not None else None
    embeds, mask = slots.embeds(), slots.attention_mask()
    masks: dict[str, Any] | None = None
    if arguments.masks is not None:
        columns = None if slots.columns is None else slots.columns.clamp(min=0)
        masks = arguments.masks.build(embeds, mask, view, positions, columns)
    inputs = DecoderInputs(
        position_rows=positions.shape[0] if positions.dim() == 3 else None,
        masks=None if masks is None else tuple(masks),
        cached=cache is not None,
        packed=len(packed[1]),
        constants=arguments.constants,
    )
    program: Program = compiled.program(slots.keep, layout.universe, inputs)
    if mask is None and cache is None and slots.columns is not None:
        mask = torch.ones(slots.batch, slots.count, dtype=torch.long, device=slots.device)
    selector = MaskSelector(layout, cache.entries if cache is not None else {}, past)
    values: dict[str, Any] = {
        "inputs_embeds": embeds,
        "position_ids": positions,
        "attention_mask": mask,
        "past_key_values": cache,
        "cache_view": view,
        "masks": selector,
        PACKED_MASK: packed[0],
    }
    values |= {f"attention_mask_{key}": value for key, value in (masks or {}).items()}
    values |= {f"packed_{index}": feature for index, feature in enumerate(packed[1])}
    index = {
        "gather": lambda spec: layout.gather_index(spec.tokens, spec.others[0]),
        "scatter": lambda spec: layout.scatter_index(spec.tokens, spec.others[0]),
        "merge": lambda spec: layout.merge_index(spec.tokens, spec.others),
    }
    hidden = program(values, lambda spec: index[spec.kind](spec))
    slots.commit(program, selector)
    hidden = _caller_rows(compiled, arguments, slots, layout, program.output_tokens, hidden)
    output_class = program.output_class
    if output_class is None:
        return (hidden, cache)
    return output_class(last_hidden_state=hidden, past_key_values=cache)


def _caller_rows(
    compiled: Any, arguments: _Arguments, slots: _Slots, layout: TokenLayout, held: TokenSet, hidden: Tensor
) -> Tensor:
    """Rows in the caller's columns; a removed token's row is the final norm of its projected embedding."""
    rows = slots.call.rows if layout.universe.requested_groups is not None else slots.tokens
    if slots.columns is None and rows == slots.tokens:
        return hidden
    grid, valid = layout.slots(held)
    if slots.reduction is not None and slots.reduction.columns is not None:
        columns = slots.reduction.columns.gather(1, grid)
        valid = valid & (columns >= 0)
    else:
        columns = grid
    first = slots.tokens - rows
    valid = valid & (columns >= first)
    if grid.shape[1] == rows and bool(valid.all()) and bool((columns == torch.arange(first, slots.tokens)).all()):
        return hidden
    source = torch.zeros(slots.batch, rows, dtype=torch.long)
    numbers = torch.arange(1, grid.numel() + 1).view_as(grid)
    batch_rows = torch.arange(slots.batch)[:, None].expand_as(grid)
    source[batch_rows[valid], columns[valid] - first] = numbers[valid]
    source = source.to(slots.device)
    removed = compiled.finish(arguments.embeds[:, first:].to(hidden))
    flat = torch.cat([hidden.new_zeros(1, hidden.shape[-1]), hidden.flatten(0, 1)])
    return torch.where((source > 0)[..., None], torch.nn.functional.embedding(source, flat), removed)
