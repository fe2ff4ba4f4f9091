"""Decoders that put image features among their embeddings themselves.

Most outer models do that and hand over embeddings. For the few decoders that take pixels it is done before, by their
own methods, so that the visual tokens are known and can be reduced like any others.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dop_compile.slots import Call

__all__ = ["merge_images"]


def _by_features(
    decoder: Any, input_ids: Tensor | None, embeds: Tensor, images: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    features = decoder.get_image_features(**images, return_dict=True).pooler_output
    mask = decoder.get_placeholder_mask(input_ids, inputs_embeds=embeds, image_features=features)
    return embeds.masked_scatter(mask, features), mask


MERGERS = {"ChameleonModel": (_by_features, ("pixel_values",))}
"""How each class merges, and the arguments that it takes for it."""


def merge_images(decoder: Any, call: Call, arguments: dict[str, Any]) -> None:
    """Replace pixels among a decoder's arguments by embeddings with their features, and note the visual tokens."""
    merge, names = MERGERS.get(type(decoder).__name__, (None, ()))
    images = {name: value for name in names if (value := arguments.pop(name, None)) is not None}
    if merge is None or not images:
        return
    input_ids, embeds = arguments.pop("input_ids", None), arguments.get("inputs_embeds")
    if embeds is None:
        embeds = decoder.get_input_embeddings()(input_ids)
    arguments["inputs_embeds"], mask = merge(decoder, input_ids, embeds, images)
    call.visual.append(mask)
