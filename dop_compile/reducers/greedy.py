"""Greedy choices that go on token by token, for several images at once.

Step t reads one row of the similarity per image and the t rows of the factor found so far: O(N t) numbers. A longer
choice begins with the shorter one. On a GPU the steps are compiled, since there a launch costs more than its work.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dop_compile.reducers.numbers import wide

__all__ = ["farthest_points", "greedy_map"]

EXPLAINED = 1e-6
"""Share of a token's own variance below which the chosen tokens are taken to explain it in full: the similarities are
rounded to float32."""


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
    images, tokens = quality.shape
    device = similarity.device
    quality = quality.to(wide(device))
    own = quality.square() * similarity.diagonal(dim1=1, dim2=2)
    variance, factor = own.clone(), quality.new_zeros(images, max(count, 1), tokens)
    chosen = torch.empty(images, count, dtype=torch.long, device=device)
    compiled = device.type == "cuda" if compiled is None else compiled
    step: Any = _compiled_step() if compiled else _step
    for number in range(count):
        # Fixed shapes let one compiled step serve all; without it, reading only the rows found so far is cheaper
        known = factor if compiled else factor[:, :number]
        chosen[:, number], factor[:, number], variance = step(similarity, quality, own, variance, known)
    return chosen


def _step(
    similarity: Tensor, quality: Tensor, own: Tensor, variance: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The next token (images,), its row of the Cholesky factor (images, N), and the variances it leaves.

    `variance` (images, N) is -inf for tokens chosen before; `factor` (images, rows, N) may have rows of zeros.
    """
    token = variance.float().argmax(dim=1)
    at = token[:, None]
    left = variance.gather(1, at)
    tokens = quality.shape[1]
    image = torch.arange(len(token), device=token.device)
    row = similarity.view(-1, tokens)[image * tokens + token] * quality * quality.gather(1, at)
    coefficients = factor[image, :, token][..., None]
    row = row - (coefficients.transpose(1, 2) @ factor)[:, 0]
    explains = left > EXPLAINED * own.gather(1, at)
    update = torch.where(explains, row / left.clamp(min=torch.finfo(torch.float32).tiny).sqrt(), 0.0)
    variance = variance - update.square()
    variance = torch.where((variance > EXPLAINED * own) | variance.isneginf(), variance, 0.0)
    return token, update, variance.scatter(1, at, -torch.inf)


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
    images, tokens = distance.shape[:2]
    chosen = torch.empty(images, count, dtype=torch.long, device=distance.device)
    itself = torch.eye(tokens, dtype=torch.bool, device=distance.device)
    nearest = distance.masked_fill(itself, torch.inf).amin(dim=-1) if tokens else distance.new_empty(images, 0)
    open_ = torch.full_like(nearest, torch.inf)
    image = torch.arange(images, device=distance.device)
    for number in range(count):
        token = nearest.argmax(dim=1, keepdim=True)
        row = distance.view(-1, tokens)[image * tokens + token[:, 0]]
        open_ = torch.minimum(open_, row).scatter(1, token, -torch.inf)
        nearest = open_
        chosen[:, number] = token[:, 0]
    return chosen
