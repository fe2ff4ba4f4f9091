"""How many tokens each image or video has, told from what a feature method was given and what it returned.

Runs of placeholders do not tell: rows of patches may have ids between them (Mistral 3), and two images may have none.

1. A list has one entry per image or video, in the order in which they fill the placeholders.
2. One tensor, with a grid of patches for each: parts in proportion to their patches.
3. One tensor, of pixels (images, 3, height, width) or (videos, frames, 3, height, width): equal parts.
4. One tensor (images, tokens, hidden) of pixels in another layout: its rows.
(not told) feature methods that return tiles, or all images of a row of the batch as one, and anything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dop_compile.hf.names import TILED

__all__ = ["feature_parts", "has_items", "item_sizes"]


def has_items(*class_names: str) -> bool:
    """Whether what a model's feature methods return is one entry per image or video."""
    return not any(name.startswith(TILED) for name in class_names)


def feature_parts(output: Any) -> list[Tensor] | None:
    """What a feature method returned, (..., hidden) each; None if it is nothing that could be scattered as it is."""
    pooled = getattr(output, "pooler_output", output)
    parts = [pooled] if isinstance(pooled, Tensor) else list(pooled) if isinstance(pooled, list | tuple) else []
    if not all(isinstance(part, Tensor) and part.dim() > 1 for part in parts):
        return None
    return parts if len({part.shape[-1] for part in parts}) == 1 else None


def item_sizes(output: Any, named: Mapping[str, Any]) -> tuple[int, ...]:
    """Tokens, newlines included, of each image or video of one call; () where that is not told.

    Args:
        output: what the feature method returned.
        named: its arguments by name.
    """
    parts = feature_parts(output)
    if parts is None:
        return ()
    if len(parts) > 1 or not isinstance(getattr(output, "pooler_output", output), Tensor):
        return tuple(part.shape[:-1].numel() for part in parts)
    (rows,) = parts
    tokens = rows.shape[:-1].numel()
    grid = next((value for name, value in named.items() if name.endswith("_grid_thw")), None)
    if grid is not None:
        shares = grid.prod(dim=-1).tolist()
    else:
        shares = [1] * (_pictures(named) or (rows.shape[0] if rows.dim() > 2 else 0))
    if not shares or any(tokens * own % sum(shares) for own in shares):
        return ()
    return tuple(tokens * own // sum(shares) for own in shares)


def _pictures(named: Mapping[str, Any]) -> int:
    """The number of images or videos whose pixels are not cut into patches; 0 of others."""
    for name, value in named.items():
        if name.startswith("pixel_values") and isinstance(value, Tensor):
            whole = value.dim() == 5 or (value.dim() == 4 and "video" not in name)
            return value.shape[0] if whole and value.shape[-3] in (1, 3) else 0
    return 0
