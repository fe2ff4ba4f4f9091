"""Apply a reducer to one sample: divide the count, select, check, merge.

1. The sample's images or frames share the count by `quotas`.
2. The reducer is called once per segment (once in all if it has `whole_sample = True`).
3. What it returns is checked; a reducer may be anybody's, and a wrong index would be a wrong answer.
4. The segments' rankings are merged into one by relative rank, so that the best tokens of each image come
   before the worst of any.
"""

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from dop_compile.reducers.base import OPTIONAL_FIELDS, Reducer, Selection, VisualContext
from dop_compile.reducers.quotas import quotas

__all__ = ["select_tokens"]


def select_tokens(reducer: Reducer, context: VisualContext, count: int) -> Selection:
    """Keep `count` tokens of a sample, or all where it has fewer.

    Args:
        reducer: any `Reducer`.
        context: the whole sample.
        count: tokens to keep over all its images or frames.

    Returns:
        min(count, tokens) checked indices over the whole sample, ranked best first, on the device of
        `context.projected`; with features and positions if the reducer gave any.

    Raises:
        ValueError: a negative count, a field that the reducer requires and the context lacks, or a selection
            with duplicates, indices out of range, a wrong dtype, shape, device or number, or NaN features.
        TypeError: the reducer returned no `Selection` of tensors.
    """
    if count < 0:
        raise ValueError(f"cannot keep {count} visual tokens")
    _check_requirements(reducer, context)
    count = min(count, context.tokens)
    device = context.projected.device
    if count == 0:
        return Selection(torch.empty(0, dtype=torch.long, device=device))
    if getattr(reducer, "whole_sample", False):
        return _checked(reducer, context, count)

    segments = context.segments.cpu()
    if int(segments.min()) < 0:
        raise ValueError("segments must not be negative")
    sizes = torch.bincount(segments).tolist()
    if context.grid is not None and len(context.grid) < len(sizes):
        raise ValueError(f"grid must have an entry for each of {len(sizes)} segments, not {len(context.grid)}")
    if len(sizes) == 1:
        return _checked(reducer, context, count)

    members: list[Tensor] = []
    selections: list[Selection] = []
    for segment, quota in enumerate(quotas(count, sizes)):
        if quota:
            member = (segments == segment).nonzero().squeeze(1).to(device)
            members.append(member)
            selections.append(_checked(reducer, _narrowed(context, member, segment), quota))
    return _merged(context, members, selections)


def _check_requirements(reducer: Reducer, context: VisualContext) -> None:
    unknown = sorted(reducer.requires - OPTIONAL_FIELDS)
    if unknown:
        raise ValueError(
            f"reducer {reducer.name!r} requires {', '.join(unknown)}, which no context has; "
            f"known are {', '.join(sorted(OPTIONAL_FIELDS))}"
        )
    missing = sorted(field for field in reducer.requires if getattr(context, field) is None)
    if missing:
        raise ValueError(
            f"reducer {reducer.name!r} requires {', '.join(missing)}, which this model does not supply; "
            "choose another reducer"
        )


def _narrowed(context: VisualContext, member: Tensor, segment: int) -> VisualContext:
    """The context of one segment alone, whose tokens are `member`: (segment_tokens,)."""

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[member.to(tensor.device)]

    return replace(
        context,
        projected=context.projected[member],
        segments=torch.zeros_like(member, device=context.segments.device),
        features=rows(context.features),
        cls_attention=rows(context.cls_attention),
        grid=None if context.grid is None else (context.grid[segment],),
        segment_index=segment,
    )


def _merged(context: VisualContext, members: list[Tensor], selections: list[Selection]) -> Selection:
    """One ranking over the sample. Rank r of k kept stands at (r + 0.5) / k; ties: the lower segment."""
    device = context.projected.device
    # Equal fractions are equal doubles, since division rounds correctly; so ties stay ties.
    ranks = [
        (torch.arange(len(s.indices), dtype=torch.float64, device=s.indices.device) + 0.5) / len(s.indices)
        for s in selections
    ]
    order = torch.cat(ranks).argsort(stable=True).to(device)
    indices = torch.cat([member[s.indices] for member, s in zip(members, selections, strict=True)])[order]

    features = positions = None
    if any(s.features is not None for s in selections):
        features = torch.cat(
            [
                context.projected[member[s.indices]] if s.features is None else s.features
                for member, s in zip(members, selections, strict=True)
            ]
        )[order]
    if any(s.positions is not None for s in selections):
        positions = torch.cat(
            [
                member[s.indices if s.positions is None else s.positions]
                for member, s in zip(members, selections, strict=True)
            ]
        )[order]
    return Selection(indices, features, positions)


def _checked(reducer: Reducer, context: VisualContext, count: int) -> Selection:
    """Call the reducer and check what it returns; its index tensors are moved to the context's device."""
    selection = reducer(context, count)
    who = f"reducer {reducer.name!r}"
    if not isinstance(selection, Selection):
        raise TypeError(f"{who} must return a Selection, not {type(selection).__name__}")
    indices = _checked_tokens(f"{who}: indices", selection.indices, context, count)
    if len(set(indices)) != count:
        twice = next(index for index, times in Counter(indices).items() if times > 1)
        raise ValueError(f"{who}: indices contain {twice} more than once")
    device = context.projected.device
    positions = selection.positions
    if positions is not None:
        _checked_tokens(f"{who}: positions", positions, context, count)
        positions = positions.to(device)
    if selection.features is not None:
        _check_features(f"{who}: features", selection.features, context, count)
    return Selection(selection.indices.to(device), selection.features, positions)


def _checked_tokens(what: str, value: object, context: VisualContext, count: int) -> list[int]:
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} must be a tensor, not {type(value).__name__}")
    if value.dtype != torch.long:
        raise ValueError(f"{what} must be int64, not {value.dtype}")
    if value.shape != (count,):
        raise ValueError(f"{what} must have shape ({count},), as asked for, not {tuple(value.shape)}")
    tokens: list[int] = value.tolist()
    for token in tokens:
        if not 0 <= token < context.tokens:
            raise ValueError(f"{what} contain {token}, out of range for {context.tokens} visual tokens")
    return tokens


def _check_features(what: str, value: object, context: VisualContext, count: int) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} must be a tensor, not {type(value).__name__}")
    expected = (count, context.projected.shape[1])
    if value.shape != expected:
        raise ValueError(f"{what} must have shape {expected}, not {tuple(value.shape)}")
    like = context.projected
    if value.dtype != like.dtype or value.device != like.device:
        raise ValueError(
            f"{what} must be {like.dtype} on {like.device}, as `projected` is, not {value.dtype} on {value.device}"
        )
    # A NaN that was there before the reducer is not its fault, and passes through as in the original.
    if bool(value.isnan().any()) and not bool(like.isnan().any()):
        raise ValueError(f"{what} contain NaN, though the features it was given do not")
