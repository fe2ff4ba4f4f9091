"""What one image or video of a family is, as many placeholders as the class itself makes features of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.families import BREAK, END, IMAGE, START, VIDEO, Visual, VisualMaker

__all__ = ["fitted", "grid_image", "grid_video", "patches", "pixels", "sized_pixels", "tiles"]

Tensors = Callable[[int, torch.Generator], dict[str, Tensor]]


def fitted(make_tensors: Tensors, kind: str = "image", marked: bool = True) -> VisualMaker:
    """An image (or video) whose features are counted: `get_image_features` is asked for them.

    Args:
        make_tensors: the tensors of a variant.
        kind: "image" or "video".
        marked: whether START and END stand around the placeholders.
    """

    def make(model: nn.Module, variant: int, generator: torch.Generator) -> Visual:
        tensors = make_tensors(variant, generator)
        owner = model if hasattr(model, f"get_{kind}_features") else model.base_model
        given = {
            name: value.to(model.device, model.dtype) if value.is_floating_point() else value
            for name, value in tensors.items()
        }
        with torch.no_grad():
            features = getattr(owner, f"get_{kind}_features")(**given)
        count = sum(part.flatten(0, -2).shape[0] for part in _tensors(getattr(features, "pooler_output", features)))
        ids = [IMAGE if kind == "image" else VIDEO] * count
        return Visual([START, *ids, END] if marked else ids, tensors)

    return make


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for part in value:
            yield from _tensors(part)


def pixels(side: int = 24, name: str = "pixel_values", frames: tuple[int, ...] = (), **masks: int) -> Tensors:
    """(1, *frames, 3, side, side) of one size; `masks` names masks of ones (1, *frames, side, side)."""

    def make(variant: int, generator: torch.Generator) -> dict[str, Tensor]:
        tensors = {name: torch.randn(1, *frames, 3, side, side, generator=generator)}
        return tensors | {mask: torch.ones(1, *frames, side, side, dtype=torch.long) for mask in masks}

    return make


def patches(count: int, values: int) -> Tensors:
    """(1, patches, values)."""
    return lambda variant, generator: {"pixel_values": torch.randn(1, count, values, generator=generator)}


def sized_pixels(*sizes: tuple[int, int]) -> Tensors:
    """(1, 3, height, width) and `image_sizes`."""

    def make(variant: int, generator: torch.Generator) -> dict[str, Tensor]:
        height, width = sizes[variant % len(sizes)]
        image = torch.randn(1, 3, height, width, generator=generator)
        return {"pixel_values": image, "image_sizes": torch.tensor([[height, width]])}

    return make


def tiles(side: int = 16) -> Tensors:
    """LLaVA-NeXT: a base image and tiles of `side`, (1, tiles, 3, side, side), and the image's own size."""

    def make(variant: int, generator: torch.Generator) -> dict[str, Tensor]:
        height, width, count = [(1.0, 2.0, 3), (2.0, 1.0, 3), (1.9, 1.3, 5)][variant % 3]
        image = torch.randn(1, count, 3, side, side, generator=generator)
        return {"pixel_values": image, "image_sizes": torch.tensor([[int(height * side), int(width * side)]])}

    return make


def grid_image(patch_values: int, **extra: Any) -> Tensors:
    """Qwen's flattened patches (patches, values) and `image_grid_thw`."""

    def make(variant: int, generator: torch.Generator) -> dict[str, Tensor]:
        _, height, width = grid = [(1, 6, 6), (1, 4, 8), (1, 4, 4)][variant % 3]
        image = torch.randn(height * width, patch_values, generator=generator)
        tensors = {"pixel_values": image, "image_grid_thw": torch.tensor([grid])}
        return tensors | {name: torch.tensor(value) for name, value in extra.items()}

    return make


def grid_video(patch_values: int, **extra: Any) -> Tensors:
    def make(variant: int, generator: torch.Generator) -> dict[str, Tensor]:
        frames, height, width = grid = [(2, 4, 4), (3, 4, 6)][variant % 2]
        video = torch.randn(frames * height * width, patch_values, generator=generator)
        tensors = {"pixel_values_videos": video, "video_grid_thw": torch.tensor([grid])}
        return tensors | {name: torch.tensor(value) for name, value in extra.items()}

    return make


def rows_of_breaks(maker: VisualMaker) -> VisualMaker:
    """The placeholders of `maker` with a BREAK id in their middle, as processors write rows of patches."""

    def make(model: nn.Module, variant: int, generator: torch.Generator) -> Visual:
        visual = maker(model, variant, generator)
        half = len(visual.ids) // 2
        return Visual([*visual.ids[:half], BREAK, *visual.ids[half:]], visual.tensors)

    return make
