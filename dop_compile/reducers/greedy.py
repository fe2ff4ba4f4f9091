"""Greedy choices that go on token by token, for several images at once.

Step t reads one row of the similarity per image and the t rows of the factor found so far: O(N t) numbers. A longer
choice begins with the shorter one. On a GPU the steps are compiled, since there a launch costs more than its work.

1. Small images (on a GPU middle-sized ones too): the similarity of all tokens with all is there.
2. Large ones on the CPU: `lazy`.
3. Large ones on a GPU, which a decision in Python would make wait, or in an export: each step computes its row.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dop_compile.reducers.base import VisualContext
from dop_compile.reducers.cosines import Cosines
from dop_compile.reducers.lazy import farthest_points_lazily, greedy_map_lazily
from dop_compile.reducers.numbers import LARGE, at_once, cosine, stacked, wide

__all__ = ["diverse_tokens", "far_tokens", "farthest_points", "greedy_map"]

EXPLAINED = 1e-6
"""Share of a token's own variance below which the chosen tokens are taken to explain it in full: the similarities are
rounded to float32."""
LARGE_ON_GPU = 6144
"""As `LARGE`, on a GPU: there a stored row of similarity (144 MiB for all of them) costs one launch, and one that is
made costs many."""


@torch.no_grad()
def diverse_tokens(contexts: Sequence[VisualContext], count: int) -> list[Tensor]:
    """`greedy_map` for the projected features and the relevance of contexts of equal size: (count,) int64 each."""
    if _is_small(contexts[0].projected):
        return _small(contexts, lambda some: greedy_map(_similarity(some), stacked(some, "relevance"), count))
    found = []
    for context in contexts:
        assert context.relevance is not None
        if _in_python(context.projected):
            found.append(greedy_map_lazily(context.projected, context.relevance, count, EXPLAINED))
        else:
            cosines = Cosines(context.projected)
            own, quality = cosines.own()[None], context.relevance[None]
            found.append(_greedy_map(_rows_of(cosines), own, quality, count, False)[0])
    return found


@torch.no_grad()
def far_tokens(contexts: Sequence[VisualContext], count: int) -> list[Tensor]:
    """`farthest_points` for the projected features of contexts of equal size: (count,) int64 each."""
    if _is_small(contexts[0].projected):
        return _small(contexts, lambda some: farthest_points(1 - _similarity(some), count))
    found = []
    for context in contexts:
        if _in_python(context.projected):
            found.append(farthest_points_lazily(context.projected, count))
            continue
        cosines = Cosines(context.projected)
        numbers = torch.arange(context.tokens, device=cosines.device)
        nearest = []
        for some in numbers.split(LARGE):
            near = torch.full((len(some),), -torch.inf, device=cosines.device)
            for others in numbers.split(LARGE):
                similarity = cosines.with_units(some, cosines.units(others))
                similarity = similarity.masked_fill(some[:, None] == others, -torch.inf)
                near = torch.maximum(near, similarity.amax(dim=1))
            nearest.append(1 - near)
        rows = functools.partial(_distances, _rows_of(cosines))
        found.append(_farthest_points(rows, torch.cat(nearest)[None], count)[0])
    return found


def _distances(rows: Callable[[Tensor], Tensor], token: Tensor) -> Tensor:
    return 1 - rows(token)


def _is_small(features: Tensor) -> bool:
    return len(features) <= (LARGE if features.device.type == "cpu" else LARGE_ON_GPU)


def _small(contexts: Sequence[VisualContext], choose: Callable[[Sequence[VisualContext]], Tensor]) -> list[Tensor]:
    each = at_once(contexts, "projected")
    return [row for first in range(0, len(contexts), each) for row in choose(contexts[first : first + each])]


def _similarity(contexts: Sequence[VisualContext]) -> Tensor:
    return cosine(stacked(contexts, "projected"))


def _in_python(features: Tensor) -> bool:
    return features.device.type == "cpu" and not torch.compiler.is_exporting()


def _rows_of(cosines: Cosines) -> Callable[[Tensor], Tensor]:
    """Cosines (1, N) of one token (1,) with all, some rows at a time."""
    numbers = torch.arange(cosines.tokens, device=cosines.device).split(4 * LARGE)

    def rows(token: Tensor) -> Tensor:
        unit = cosines.units(token)
        return torch.cat([cosines.with_units(some, unit)[:, 0] for some in numbers])[None]

    return rows


def _rows_in(similarity: Tensor) -> Callable[[Tensor], Tensor]:
    """Rows (images, N) of one token per image (images,)."""
    images, tokens = similarity.shape[:2]
    first = torch.arange(images, device=similarity.device) * tokens
    return lambda token: similarity.view(-1, tokens)[first + token]


def greedy_map(similarity: Tensor, quality: Tensor, count: int, *, compiled: bool | None = None) -> Tensor:
    """Greedy maximum a posteriori choice of a determinantal point process (Chen et al. 2018, algorithm 1).

    The kernel is L_ij = quality_i similarity_ij quality_j. Each step takes the token that multiplies the determinant of
    the chosen ones' kernel most. Where no token is left that the chosen ones do not explain, the lowest index is taken.

    Args:
        similarity: (images, N, N) float32, symmetric and positive semi-definite up to rounding.
        quality: (images, N), not negative.
        count: tokens to choose, at most N.
        compiled: whether to compile the step; None: on CUDA.

    Returns:
        (images, count) int64, in the order of choice.
    """
    compiled = similarity.device.type == "cuda" if compiled is None else compiled
    return _greedy_map(_rows_in(similarity), similarity.diagonal(dim1=1, dim2=2), quality, count, compiled)


def _greedy_map(
    rows: Callable[[Tensor], Tensor], diagonal: Tensor, quality: Tensor, count: int, compiled: bool
) -> Tensor:
    images, tokens = quality.shape
    quality = quality.to(wide(quality.device))
    own = quality.square() * diagonal
    variance, factor = own.clone(), quality.new_zeros(images, max(count, 1), tokens)
    chosen = torch.empty(images, count, dtype=torch.long, device=quality.device)
    step: Any = _compiled_step() if compiled else _step
    for number in range(count):
        # Fixed shapes let one compiled step serve all; without it, reading only the rows found so far is cheaper
        known = factor if compiled else factor[:, :number]
        token = variance.float().argmax(dim=1)
        chosen[:, number] = token
        factor[:, number], variance = step(token, rows(token), quality, own, variance, known)
    return chosen


def _step(
    token: Tensor, row: Tensor, quality: Tensor, own: Tensor, variance: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """A token's (images,) row of the Cholesky factor (images, N), and the variances it leaves.

    `row` (images, N) is its similarity to all; `variance` (images, N) is -inf for tokens chosen before; `factor`
    (images, rows, N) may have rows of zeros.
    """
    at = token[:, None]
    left = variance.gather(1, at)
    image = torch.arange(len(token), device=token.device)
    row = row * quality * quality.gather(1, at)
    coefficients = factor[image, :, token][..., None]
    row = row - (coefficients.transpose(1, 2) @ factor)[:, 0]
    explains = left > EXPLAINED * own.gather(1, at)
    update = torch.where(explains, row / left.clamp(min=torch.finfo(torch.float32).tiny).sqrt(), 0.0)
    variance = variance - update.square()
    variance = torch.where((variance > EXPLAINED * own) | variance.isneginf(), variance, 0.0)
    return update, variance.scatter(1, at, -torch.inf)


@functools.cache
def _compiled_step() -> Callable[..., Any]:
    """`_step` compiled; on a machine without a compiler it runs as it is, after a warning."""
    compiled = torch.compile(_step, dynamic=True)
    works = True

    def step(*args: Tensor) -> Any:
        nonlocal works
        if works:
            try:
                return compiled(*args)
            except torch._dynamo.exc.BackendCompilerFailed as error:
                works = False
                warnings.warn(f"greedy selection runs uncompiled, and slower: {error}", RuntimeWarning, stacklevel=4)
        return _step(*args)

    return step


def farthest_points(distance: Tensor, count: int) -> Tensor:
    """First the token farthest from its nearest neighbour, then always the one farthest from those chosen.

    Args:
        distance: (images, N, N) float32, symmetric.
        count: tokens to choose, at most N.

    Returns:
        (images, count) int64, in the order of choice; ties: the lowest index.
    """
    tokens = distance.shape[1]
    itself = torch.eye(tokens, dtype=torch.bool, device=distance.device)
    nearest = distance.masked_fill(itself, torch.inf).amin(dim=-1) if tokens else distance.new_empty(len(distance), 0)
    return _farthest_points(_rows_in(distance), nearest, count)


def _farthest_points(rows: Callable[[Tensor], Tensor], nearest: Tensor, count: int) -> Tensor:
    """`nearest` (images, N) is each token's distance to its nearest neighbour."""
    chosen = torch.empty(len(nearest), count, dtype=torch.long, device=nearest.device)
    open_ = torch.full_like(nearest, torch.inf)
    for number in range(count):
        token = nearest.argmax(dim=1, keepdim=True)
        open_ = torch.minimum(open_, rows(token[:, 0])).scatter(1, token, -torch.inf)
        nearest = open_
        chosen[:, number] = token[:, 0]
    return chosen
