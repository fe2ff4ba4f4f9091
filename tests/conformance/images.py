"""What one image or video of a family is, as many placeholders as the class itself makes features of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from tests.families import BREAK, END, IMAGE, START, VIDEO, Visual, VisualMaker

__all__ = ["fitted", "grid_image", "grid_video", "patches", "pixels", "placed_patches", "sized_pixels", "tiles"]

Tensors = Callable[[int, torch.Generator], dict[str, Tensor]]


def fitted(make_tensors: Tensors, kind: str = "image", marked: bool = True, per_row: bool = False) -> VisualMaker:
    """An image (or video) whose features are counted: `get_image_features` is asked for them.

    Args:
        make_tensors: the tensors of a variant.
        kind: "image" or "video".
        marked: whether START and END stand around the placeholders.
        per_row: whether the class wants a dimension for the rows of a batch before that of the images.
    """

    def make(model: nn.Module, variant: int, generator: torch.Generator) -> Visual:
        tensors = make_tensors(variant, generator)
        owner = model if hasattr(model, f"get_{kind}_features") else model.base_model
        given = {
            name: value.to(model.device, model.dtype) if value.is_floating_point() else value
            for name, value in tensors.items()
        }
        if per_row:
            given = {name: value[None] for name, value in given.items()}
        with torch.no_grad():
            features = getattr(owner, f"get_{kind}_features")(**given)
        output = features.pooler_output
        if output is None:  # Granite 4 Vision has features for some layers only; Fuyu has plain embeddings
            output = features.deepstack_features[0][1] if hasattr(features, "deepstack_features") else features
        count = sum(part.flatten(0, -2).shape[0] for part in _tensors(output))
        ids = [IMAGE if kind == "image" else VIDEO] * count
        return Visual([START, *ids, END] if marked else ids, tensors)

    return make


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, ModelOutput):
        yield value.last_hidden_state
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


def placed_patches(values: int, side: int = 6) -> Tensors:
    """Gemma 4: (1, side * side, values), and where each patch stands."""

    def make(variant: int, generator: torch.Generator) -> dict[str, Tensor]:
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(-1)[None]
        return {"pixel_values": torch.rand(1, side * side, values, generator=generator), "image_position_ids": places}

    return make


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


def grid_image(*patch: int, **extra: Any) -> Tensors:
    """Qwen's flattened patches (patches, *patch) and `image_grid_thw`."""

    def make(variant: int, generator: torch.Generator) -> dict[str, Tensor]:
        _, height, width = grid = [(1, 6, 6), (1, 4, 8), (1, 4, 4)][variant % 3]
        image = torch.randn(height * width, *patch, generator=generator)
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
