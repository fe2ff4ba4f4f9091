"""Fewer pixels: a processor that makes smaller pictures, so that fewer visual tokens come out of the vision tower.

The only reduction that saves time in the vision tower, too. It is done before the model:

    policy = Policy.depthwise(28, mha_depth=20, visual_tokens=256, reducer="resize")
    small = resize_processor(processor, policy.visual_tokens)
    inputs = small(images=image, text=prompt, return_tensors="pt")

The reducer of that name only sees to it that this was done.

1. Pictures of any size (Qwen2-VL and its kin): the limit on pixels is lowered to `visual_tokens` times the pixels of a
   token (784 for Qwen2.5-VL). A picture longer than that many tokens keeps one row or column.
2. Square tiles (InternVL): their side is lowered, to the largest that gives `tiles` tiles no more than `visual_tokens`.
(refused) Towers of one resolution, as LLaVA's: smaller pictures would have to be enlarged again.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch

from dop_compile.reducers.base import Selection, VisualContext

__all__ = ["ResizeReducer", "resize_processor"]


@dataclass(frozen=True)
class ResizeReducer:
    """Keeps all tokens of pictures that are small enough, and refuses others: what it stands for was done before."""

    name = "resize"
    requires = frozenset[str]()
    whole_sample = True

    def __call__(self, context: VisualContext, count: int) -> Selection:
        """Keep all tokens.

        Raises:
            ValueError: there are more than `count`.
        """
        if context.tokens > count:
            raise ValueError(
                f"reducer 'resize': sample {context.sample_index} has {context.tokens} visual tokens, the policy is "
                f"for pictures of at most {count}; make its inputs with resize_processor(processor, {count})"
            )
        return Selection(torch.arange(count, device=context.projected.device))


def resize_processor(processor: Any, visual_tokens: int, *, tiles: int | None = None) -> Any:
    """A copy of a processor whose pictures have at most `visual_tokens` tokens each.

    Args:
        processor: a model's processor; for case 1 its image processor alone will do. It is left as it is. Videos are
            processed as before.
        visual_tokens: of one picture, at least 1.
        tiles: case 2: how many tiles a picture has, thumbnail included; None: as many as it can have.

    Raises:
        TypeError: a processor for pictures of one size, or a wrong type.
        ValueError: fewer tokens than one, or than tiles.
    """
    if not isinstance(visual_tokens, int) or isinstance(visual_tokens, bool):
        raise TypeError(f"visual_tokens must be an integer, not {visual_tokens!r}")
    if visual_tokens < 1:
        raise ValueError(
            f"visual_tokens must be at least 1, not {visual_tokens}: a picture cannot be resized to nothing"
        )
    pictures = getattr(processor, "image_processor", processor)
    size = dict(getattr(pictures, "size", None) or {})
    if size.get("longest_edge") and hasattr(pictures, "merge_size"):
        changed = _with(pictures, size=_fewer_pixels(pictures, size, visual_tokens))
        return changed if pictures is processor else _with(processor, image_processor=changed)
    if size.get("height") and hasattr(processor, "image_seq_length"):
        side, tokens = _smaller_tiles(processor, pictures, size, visual_tokens, tiles)
        size |= {"height": side, "width": side}
        changed = _with(pictures, size=type(pictures.size)(**size))
        return _with(processor, image_processor=changed, image_seq_length=tokens)
    raise TypeError(
        f"{type(processor).__name__} makes pictures of one size, which its vision tower needs; reduce visual tokens "
        "by a policy with a reducer instead"
    )


def _with(thing: Any, **attributes: Any) -> Any:
    changed = copy.copy(thing)
    for name, value in attributes.items():
        setattr(changed, name, value)
    return changed


def _fewer_pixels(pictures: Any, size: dict[str, Any], visual_tokens: int) -> Any:
    pixels = visual_tokens * (pictures.patch_size * pictures.merge_size) ** 2
    size["longest_edge"] = min(size["longest_edge"], pixels)
    size["shortest_edge"] = min(size.get("shortest_edge") or pixels, size["longest_edge"])
    return type(pictures.size)(**size)


def _smaller_tiles(
    processor: Any, pictures: Any, size: dict[str, Any], visual_tokens: int, tiles: int | None
) -> tuple[int, int]:
    """Side in pixels and tokens of a tile."""
    across = math.isqrt(processor.image_seq_length)
    if size["height"] != size["width"] or across**2 != processor.image_seq_length or size["height"] % across:
        raise TypeError(f"{type(processor).__name__} makes tiles that are not square: {size}")
    if tiles is None:
        most = int(getattr(pictures, "max_patches", 1))
        tiles = most + 1 if most > 1 else 1
    if visual_tokens < tiles:
        raise ValueError(
            f"visual_tokens={visual_tokens} leave nothing for some of {tiles} tiles; give at least {tiles}"
        )
    kept = min(math.isqrt(visual_tokens // tiles), across)
    return size["height"] // across * kept, kept**2
