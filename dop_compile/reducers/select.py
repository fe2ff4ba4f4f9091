"""Apply a reducer to the samples of a batch: divide the counts, select, check, merge.

1. The images or videos of a sample share its count by `quotas`, and so do their tiles or frames where the reducer
   wants them apart.
2. The reducer is called for each of these parts, or once for all parts of a size if it has `select_many`.
3. What it returns is checked; a reducer may be anybody's, and a wrong index would be a wrong answer.
   One that returns features is asked once more where gradients pass (`reducers.gradients`).
4. The parts' rankings are merged into one by relative rank, so that the best tokens of each image come
   before the worst of any.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dop_compile.reducers.base import OPTIONAL_FIELDS, Reducer, Selection, VisualContext
from dop_compile.reducers.check import check_features, check_indices, check_numbers
from dop_compile.reducers.gradients import carries_gradients, detached, refusing_gradients
from dop_compile.reducers.quotas import quotas

__all__ = ["needs", "select_batch", "select_tokens"]


def needs(reducer: Reducer) -> frozenset[str]:
    """The `OPTIONAL_FIELDS` that must be filled in for a reducer.

    Raises:
        ValueError: it requires a field that no context has.
    """
    required = frozenset(reducer.requires) | ({"tiles"} if getattr(reducer, "per_tile", False) else set())
    unknown = sorted(required - OPTIONAL_FIELDS)
    if unknown:
        raise ValueError(
            f"reducer {reducer.name!r} requires {', '.join(unknown)}, which no context has; "
            f"known are {', '.join(sorted(OPTIONAL_FIELDS))}"
        )
    return required


def select_tokens(reducer: Reducer, context: VisualContext, count: int) -> Selection:
    """Keep `count` tokens of a sample, or all where it has fewer.

    Args:
        reducer: any `Reducer`.
        context: the whole sample.
        count: tokens to keep over all its images.

    Returns:
        min(count, tokens) checked indices over the whole sample (fewer if the reducer has `at_most = True`), ranked
        best first, on the device of `context.projected`; with features and positions if the reducer gave any.

    Raises:
        ValueError: a negative count, a field that the reducer requires and the context lacks, or a selection
            with duplicates, indices out of range, a wrong dtype, shape, device or number, or NaN features.
        TypeError: the reducer returned no `Selection` of tensors.
    """
    (selection,) = select_batch(reducer, [context], [count])
    device = context.projected.device
    positions = None if selection.positions is None else selection.positions.to(device)
    return Selection(selection.indices.to(device), selection.features, positions)


def select_batch(reducer: Reducer, contexts: Sequence[VisualContext], counts: Sequence[int]) -> list[Selection]:
    """`select_tokens` for several samples at once; indices and positions are on the CPU."""
    found = _select(reducer, [detached(context) for context in contexts], counts)
    merges = any(selection.features is not None for selection in found)
    if not merges or not any(carries_gradients(context) for context in contexts):
        return found
    reason = f"reducer {reducer.name!r} returns features through which no gradient passes to what they were made of: "
    reason += "make them of the context's tensors by differentiable operations, or train with another reducer"
    follows = True
    try:
        again = _select(reducer, contexts, counts)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # it made features of the same values before, so it cannot follow gradients
        again, follows, reason = found, False, f"{reason} ({error})"
    return [
        selection
        if selection.features is None or (follows and selection.features.requires_grad)
        else replace(selection, features=refusing_gradients(selection.features, reason))
        for selection in again
    ]


def _select(reducer: Reducer, contexts: Sequence[VisualContext], counts: Sequence[int]) -> list[Selection]:
    parts: list[_Part] = []
    for number, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        if count < 0:
            raise ValueError(f"cannot keep {count} visual tokens")
        _check_requirements(reducer, context)
        parts += _segments(reducer, number, context, min(count, context.tokens))
    if hasattr(reducer, "prepare") and parts:
        prepared = reducer.prepare([part.context for part in parts])
        parts = [replace(part, context=context) for part, context in zip(parts, prepared, strict=True)]
    if getattr(reducer, "per_tile", False):
        parts = [tile for part in parts for tile in _tiles(part)]
    answers = _checked(reducer, parts, _ask(reducer, parts))
    merged = []
    for number, context in enumerate(contexts):
        own = [(part, answer) for part, answer in zip(parts, answers, strict=True) if part.sample == number]
        merged.append(_merged(context, own))
    return merged


@dataclass(frozen=True)
class _Part:
    """Tokens that are reduced together: `members` (part_tokens,) of a sample, None for all."""

    sample: int
    members: Tensor | None
    context: VisualContext
    count: int


def _check_requirements(reducer: Reducer, context: VisualContext) -> None:
    missing = sorted(field for field in needs(reducer) if getattr(context, field) is None)
    if missing:
        raise ValueError(
            f"reducer {reducer.name!r} requires {', '.join(missing)}, which this model does not supply; "
            "choose another reducer"
        )


def _segments(reducer: Reducer, sample: int, context: VisualContext, count: int) -> list[_Part]:
    if count == 0:
        return []
    if getattr(reducer, "whole_sample", False):
        return [_Part(sample, None, context, count)]
    segments = context.segments.cpu()
    if int(segments.min()) < 0:
        raise ValueError("segments must not be negative")
    sizes = torch.bincount(segments).tolist()
    if context.grid is not None and len(context.grid) < len(sizes):
        raise ValueError(f"grid must have an entry for each of {len(sizes)} segments, not {len(context.grid)}")
    if len(sizes) == 1:
        return [_Part(sample, None, context, count)]
    parts = []
    for segment, quota in enumerate(quotas(count, sizes)):
        if quota:
            members = (segments == segment).nonzero().squeeze(1)
            narrowed = replace(
                _narrowed(context, members),
                segments=torch.zeros_like(members, device=context.segments.device),
                grid=None if context.grid is None else (context.grid[segment],),
                segment_index=segment,
            )
            parts.append(_Part(sample, members, narrowed, quota))
    return parts


def _tiles(part: _Part) -> list[_Part]:
    assert part.context.tiles is not None
    names, tiles = torch.unique(part.context.tiles.cpu(), return_inverse=True)
    if len(names) == 1:
        return [part]
    result = []
    for tile, quota in enumerate(quotas(part.count, torch.bincount(tiles).tolist())):
        if quota:
            own = (tiles == tile).nonzero().squeeze(1)
            members = own if part.members is None else part.members[own]
            result.append(_Part(part.sample, members, _narrowed(part.context, own), quota))
    return result


def _narrowed(context: VisualContext, members: Tensor) -> VisualContext:
    """The context of some of the tokens alone: (members,) on the CPU, ascending."""
    first, last = int(members[0]), int(members[-1])
    run = slice(first, last + 1) if last + 1 - first == len(members) else None  # a view costs no copy

    def rows(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or run is not None:
            return None if tensor is None else tensor[run]
        return tensor[members.to(tensor.device)]

    fields = ("projected", "segments", "features", "cls_attention", "keys", "tiles", "relevance")
    narrowed: dict[str, Any] = {name: rows(getattr(context, name)) for name in fields}
    return replace(context, **narrowed)


def _ask(reducer: Reducer, parts: list[_Part]) -> list[Any]:
    many = getattr(reducer, "select_many", None)
    if many is None:
        return [reducer(part.context, part.count) for part in parts]
    by_size: dict[int, list[int]] = {}
    for number, part in enumerate(parts):
        by_size.setdefault(part.context.tokens, []).append(number)
    answers: list[Any] = [None] * len(parts)
    for numbers in by_size.values():
        found = many([parts[number].context for number in numbers], [parts[number].count for number in numbers])
        for number, answer in zip(numbers, found, strict=True):
            answers[number] = answer
    return answers


def _checked(reducer: Reducer, parts: list[_Part], answers: list[Any]) -> list[Selection]:
    """What the reducer returned, checked; index tensors are moved to the CPU."""
    who = f"reducer {reducer.name!r}"
    for answer in answers:
        if not isinstance(answer, Selection):
            raise TypeError(f"{who} must return a Selection, not {type(answer).__name__}")
    sizes = [(part.context.tokens, part.count) for part in parts]
    at_most = getattr(reducer, "at_most", False)
    indices = check_indices(f"{who}: indices", [a.indices for a in answers], sizes, unique=True, at_most=at_most)
    kept = [(tokens, len(rows)) for (tokens, _), rows in zip(sizes, indices, strict=True)]
    moved = [(a.positions, size) for a, size in zip(answers, kept, strict=True) if a.positions is not None]
    positions = iter(check_indices(f"{who}: positions", [p for p, _ in moved], [size for _, size in moved]))
    for part, answer, rows in zip(parts, answers, indices, strict=True):
        if answer.features is not None:
            check_features(f"{who}: features", answer.features, part.context, len(rows))
    both = zip(parts, answers, strict=True)
    merged = [(a.features, part.context.projected) for part, a in both if a.features is not None]
    check_numbers(f"{who}: features", merged)
    return [
        Selection(rows, answer.features, None if answer.positions is None else next(positions))
        for answer, rows in zip(answers, indices, strict=True)
    ]


def _merged(context: VisualContext, own: list[tuple[_Part, Selection]]) -> Selection:
    """One ranking over the sample. Rank r of k kept stands at (r + 0.5) / k; ties: the lower part."""
    if not own:
        return Selection(torch.empty(0, dtype=torch.long, device="cpu"))
    if len(own) == 1 and own[0][0].members is None:
        return own[0][1]

    def of_sample(part: _Part, tokens: Tensor) -> Tensor:
        return tokens if part.members is None else part.members[tokens]

    # Equal fractions are equal doubles, since division rounds correctly; so ties stay ties.
    ranks = [
        (torch.arange(len(s.indices), dtype=torch.float64, device="cpu") + 0.5) / max(len(s.indices), 1) for _, s in own
    ]
    order = torch.cat(ranks).argsort(stable=True)
    indices = torch.cat([of_sample(part, s.indices) for part, s in own])
    features = positions = None
    if any(s.features is not None for _, s in own):
        device = context.projected.device
        parts = [part.context.projected[s.indices.to(device)] if s.features is None else s.features for part, s in own]
        features = torch.cat(parts)[order.to(device)]
    if any(s.positions is not None for _, s in own):
        positions = torch.cat([of_sample(p, s.indices if s.positions is None else s.positions) for p, s in own])[order]
    return Selection(indices[order], features, positions)
