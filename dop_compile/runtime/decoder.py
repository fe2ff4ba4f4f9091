"""One forward call of a compiled decoder: group, reduce, run the program, put rows where the caller wants them.

inputs_embeds --groups--> codes --reduce--> slots --program--> rows of requested slots --scatter--> caller's rows
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from dop_compile.errors import UnsupportedUsageError
from dop_compile.hf.kernels import is_flash
from dop_compile.hf.merging import merge_images
from dop_compile.hf.names import PACKED_FEATURES, REFUSED_OUTPUTS, UNUSED_ARGUMENTS
from dop_compile.hf.rebuilt import names_in
from dop_compile.hf.spellings import CACHE, parameters, spelled
from dop_compile.passes.blocks import IndexSpec
from dop_compile.runtime.cache import PrunedCache, ReducedView
from dop_compile.runtime.call import Arguments, Call
from dop_compile.runtime.call_rankings import CallRankings
from dop_compile.runtime.layout import TokenLayout
from dop_compile.runtime.masks import MaskSelector
from dop_compile.runtime.outer_masks import deferred
from dop_compile.runtime.packed import packed_rows
from dop_compile.runtime.program import Program
from dop_compile.runtime.slots import Slots
from dop_compile.tokens import TokenSet
from dop_compile.tracing.side_inputs import embed_ids
from dop_compile.tracing.trace import DecoderInputs

__all__ = ["run_decoder"]


def _check_arguments(decoder: Any, call: Call, kwargs: dict[str, Any]) -> Arguments:
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
        embeds = embed_ids(decoder, input_ids, kwargs)
    if embeds.shape[1] == 0:
        raise ValueError("the prompt is empty: input_ids must hold at least one token per row")
    use_cache = kwargs.pop("use_cache", None)
    use_cache = getattr(decoder.config, "use_cache", True) if use_cache is None else use_cache
    cache = kwargs.pop(CACHE, None)
    if cache is not None:
        PrunedCache.check(cache)
    mask = kwargs.pop("attention_mask", None)
    masks = deferred(mask)
    if masks is not None:
        mask = masks.attention_mask
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise UnsupportedUsageError(
            "attention_mask must be (batch, tokens), 1 for tokens and 0 for padding; masks prepared by the caller "
            "cannot follow token reduction"
        )
    positions = kwargs.pop("position_ids", None)
    if positions is None and mask is not None and _numbers_from_mask(decoder):
        positions = (mask.cumsum(1) * mask - 1)[:, -embeds.shape[1] :]
    _check_lengths(cache, embeds, mask, positions)
    packed_name, packed, packed_mask = _packed(kwargs)
    for name in UNUSED_ARGUMENTS:
        if name not in parameters(type(decoder).forward):
            kwargs.pop(name, None)
    names = [n for n, v in kwargs.items() if isinstance(v, Tensor) and v.shape[:2] == embeds.shape[:2]]
    token_inputs = {name: kwargs.pop(name) for name in names}
    constants = tuple(sorted((name, value) for name, value in kwargs.items() if value is not None))
    for name, value in constants:
        if not isinstance(value, bool | int | float | str):
            raise UnsupportedUsageError(f"{name}={type(value).__name__} is not supported by a compiled model")
    if isinstance(cache, PrunedCache):
        _check_tier(call, cache)
    if cache is not None:  # last, so that a refused call leaves the caller's cache as it was
        cache = PrunedCache.adopt(cache)
    elif use_cache:
        cache = PrunedCache()
    keys = tuple(packed) if isinstance(packed, dict) else None
    features = tuple(packed.values() if isinstance(packed, dict) else packed)
    return Arguments(
        embeds, mask, masks, positions, cache, features, packed_mask, constants, packed_name, keys, token_inputs
    )


def _numbers_from_mask(decoder: nn.Module) -> bool:
    """Whether a decoder (OPT) numbers tokens without padding if the caller does not; others count every column."""
    return "cumsum" in names_in(type(decoder).forward)


def _packed(kwargs: dict[str, Any]) -> tuple[str, Any, Tensor | None]:
    """Features of visual tokens: the argument's name, the features, and the mask of their tokens."""
    found = [(name, kwargs.pop(name, None) or (), kwargs.pop(mask, None)) for name, mask in PACKED_FEATURES.items()]
    return next((entry for entry in found if entry[1]), found[0])


def _check_tier(call: Call, cache: PrunedCache) -> None:
    if cache.columns_seen and cache.tier is not None and cache.policy != call.policy:
        raise UnsupportedUsageError(
            f"this conversation was begun under tier {cache.tier!r}; it cannot go on under {call.tier!r}, because "
            "its cache holds only what that policy keeps. Pass the same tier, or start a new conversation"
        )


def _check_lengths(cache: Any, embeds: Tensor, mask: Tensor | None, positions: Any) -> None:
    batch, new = embeds.shape[:2]
    past = 0 if cache is None else cache.get_seq_length()
    if mask is not None and mask.shape != (batch, past + new):
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)}; with {past} tokens in the cache and {new} new ones in each of "
            f"{batch} rows it must be {(batch, past + new)}"
        )
    if positions is None:
        return
    if not isinstance(positions, Tensor) or positions.dim() not in (2, 3):
        raise ValueError("position_ids must be a tensor (batch, tokens) or (axes, batch, tokens)")
    if positions.shape[-1] != new or positions.shape[-2] not in (1, batch):
        raise ValueError(
            f"position_ids are {tuple(positions.shape)}; for {new} new tokens in {batch} rows the last two sizes must "
            f"be {(batch, new)}"
        )


def _check_gaps(decoder: nn.Module, slots: Slots) -> None:
    """In a later turn the padding of rows that lost more tokens than others stands inside the conversation."""
    if _has_windows(decoder.config) and _gaps(slots):
        raise UnsupportedUsageError(
            "the rows of this batch lose different numbers of visual tokens in a later turn of a conversation, and "
            "this model's sliding windows would count the gaps; run the rows as conversations of their own"
        )


def _gaps(slots: Slots) -> bool:
    """Whether a later turn of some row has more padding behind the reduction than the caller gave it."""
    if slots.columns is None or slots.cache is None or not slots.cache.columns_seen:
        return False
    mask = slots.arguments.attention_mask
    tokens = (
        torch.full((slots.batch,), slots.tokens, device="cpu")
        if mask is None
        else mask[:, -slots.tokens :].sum(dim=1).cpu()
    )
    gaps = (slots.columns < 0).sum(dim=1).cpu()
    return bool((gaps > slots.tokens - tokens).any())


def _check_sequences(program: Program, slots: Slots, layout: TokenLayout) -> None:
    """A state decays over padding, and a window counts it: none may come between two turns of a conversation.

    At the beginning of one it leaves no trace, unless the mixers make something of it.
    """
    is_later = slots.cache is not None and slots.cache.columns_seen > 0
    if not is_later and program.ignores_padding:
        return
    padded = any(not bool(layout.slots(tokens)[1].all()) for tokens in program.sequences if not tokens.is_all)
    if not is_later and (padded or slots.has_gaps):
        raise UnsupportedUsageError(
            "the rows of this batch keep different numbers of tokens, and the recurrent or convolutional layers of "
            "this model project with a bias, which makes something of the padding that their mask hides; run the rows "
            "one at a time"
        )
    if padded or _gaps(slots):
        raise UnsupportedUsageError(
            "the rows of this batch keep different numbers of tokens in a later turn of a conversation, and the "
            "recurrent or convolutional layers of this model would take the padding between two turns into their "
            "states; run the rows as conversations of their own"
        )


def _has_windows(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    return "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None) is not None


def run_decoder(compiled: Any, decoder: nn.Module, call: Call, **kwargs: Any) -> Any:
    """The forward of a compiled model's decoder.

    Args:
        compiled: the model's `CompiledState`: its programs by keep table.
        decoder: the text decoder (this call's copy; weights shared).
        call: what the outer model's call asked for.
        kwargs: what the outer model passes to its decoder, under the names of `dop_compile.hf.spellings`.

    Returns:
        the decoder's own output class; `last_hidden_state` is (batch, rows, hidden) for `rows` last rows, else
        (batch, tokens, hidden) in the caller's columns.
    """
    if (merged := merge_images(decoder, kwargs)) is not None:
        call.visual.append(merged)
    arguments = _check_arguments(decoder, call, kwargs)
    packed_samples = packed_rows(decoder, call, arguments)
    if packed_samples is not None:
        call, arguments = packed_samples.apart(call, arguments)
    slots = Slots.of(call, arguments)
    _check_gaps(decoder, slots)
    layout = slots.layout()
    positions, cache, packed = slots.positions(), slots.cache, slots.packed()
    past = cache.slots_seen if cache is not None else 0
    view = ReducedView(past) if cache is not None else None
    embeds, mask = slots.embeds(), slots.attention_mask()
    masks: dict[str, Any] | None = None
    if arguments.masks is not None:
        total = slots.tokens + (cache.columns_seen if cache is not None else 0)
        built: Any = arguments.masks.build(embeds, mask, view, positions, slots.all_columns(), total)
        masks = built if isinstance(built, dict) else None
        mask = mask if built is None or masks is not None else built  # the decoder's own builder passes a built one on
    token_inputs = slots.token_inputs()
    if packed[0] is not None and packed[1]:
        token_inputs = {**token_inputs, PACKED_FEATURES[arguments.packed_name]: packed[0]}
    inputs = DecoderInputs(
        position_rows=positions.shape[0] if positions.dim() == 3 else None,
        masks=None if masks is None else tuple(masks),
        cached=cache is not None,
        packed=len(packed[1]),
        packed_name=arguments.packed_name,
        packed_keys=arguments.packed_keys,
        tokens=tuple((name, tuple(value.shape[2:]), value.dtype) for name, value in token_inputs.items()),
        constants=arguments.constants,
        first_layer=call.first_layer,
    )
    program: Program = compiled.program(slots.keep, layout.universe, inputs)
    if program.sequences:
        _check_sequences(program, slots, layout)
        if cache is not None:
            cache.hold_states(decoder.config)
    if mask is None and (program.needs_mask or (cache is None and slots.columns is not None)):
        mask = torch.ones(slots.batch, past + slots.count, dtype=torch.long, device=slots.device)
    config: Any = decoder.config
    make_selector = functools.partial(
        MaskSelector,
        layout,
        cache.entries if cache is not None else {},
        past,
        flash=is_flash(config._attn_implementation),
        has_gaps=slots.columns is not None or (cache is not None and cache.columns is not None),
    )
    selector = make_selector()
    values: dict[str, Any] = {
        "inputs_embeds": embeds,
        "position_ids": positions,
        "attention_mask": mask,
        CACHE: cache,
        "cache_view": view,
        "masks": selector,
    }
    if call.stream is not None:
        values["residual_stream"] = call.stream
    values |= token_inputs
    values |= {f"attention_mask_{key}": value for key, value in (masks or {}).items()}
    values |= {f"packed_{index}": feature for index, feature in enumerate(packed[1])}
    if slots.keep.ranking is not None:
        values["rankings"] = CallRankings(slots.keep.ranking, layout, selector, embeds, past, slots.newlines())
    layout.send(program.indices, program.grids)

    def index(spec: IndexSpec) -> Tensor:
        return layout.index(spec.kind, spec.tokens, spec.others)

    if compiled.graphs is None:
        hidden = program(values, index)
    else:
        hidden = compiled.graphs.run(program, values, layout, make_selector, index)
    slots.commit(program, selector)
    hidden = _caller_rows(compiled, arguments, slots, layout, program.output_tokens, hidden)
    if packed_samples is not None:
        hidden = packed_samples.together(hidden)
    output_class = program.output_class
    if output_class is None:
        return (hidden, cache)
    return output_class(last_hidden_state=hidden, **spelled(output_class, {CACHE: cache}))


def _caller_rows(
    compiled: Any, arguments: Arguments, slots: Slots, layout: TokenLayout, held: TokenSet, hidden: Tensor
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
    if (
        grid.shape[1] == rows
        and bool(valid.all())
        and bool((columns == torch.arange(first, slots.tokens, device="cpu")).all())
    ):
        return hidden
    source = torch.zeros(slots.batch, rows, dtype=torch.long, device="cpu")
    numbers = torch.arange(1, grid.numel() + 1, device="cpu").view_as(grid)
    batch_rows = torch.arange(slots.batch, device="cpu")[:, None].expand_as(grid)
    source[batch_rows[valid], columns[valid] - first] = numbers[valid]
    source = source.to(slots.device)
    removed = compiled.finish(arguments.embeds[:, first:].to(hidden))
    flat = torch.cat([hidden.new_zeros(1, hidden.shape[-1]), hidden.flatten(0, 1)])
    return torch.where((source > 0)[..., None], torch.nn.functional.embedding(source, flat), removed)
