"""Decoders that put image features among their embeddings themselves.

Most outer models do that and hand over embeddings. For the few decoders that take pixels it is done before, by their
own methods, so that the visual tokens are known and can be reduced like any others.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["merge_images"]


def _chameleon(
    decoder: Any, input_ids: Tensor | None, embeds: Tensor, images: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Features that `generate` has computed before, or those of the pixels, take the places of the placeholders."""
    output = (images.get("mm_encoder_outputs") or {}).get("image")
    if output is None and "pixel_values" not in images:
        return embeds, None
    output = decoder.get_image_features(images["pixel_values"], return_dict=True) if output is None else output
    features = output.pooler_output
    mask = decoder.get_placeholder_mask(input_ids, inputs_embeds=embeds, image_features=features)
    return embeds.masked_scatter(mask, features), mask


def _phi4_multimodal(
    decoder: Any, input_ids: Tensor | None, embeds: Tensor, images: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Its embedding module puts features of images and sounds in; what it makes of ids alone is left as it is."""
    if input_ids is None:
        return embeds, None
    visual = input_ids == decoder.config.vision_config.image_token_id
    return decoder.embed_tokens_extend(input_ids, embeds, **images), visual


_PHI4_INPUTS = (
    "image_pixel_values",
    "image_sizes",
    "image_attention_mask",
    "audio_input_features",
    "audio_embed_sizes",
    "audio_attention_mask",
)
MERGERS = {
    "ChameleonModel": (_chameleon, ("pixel_values", "mm_encoder_outputs")),
    "Phi4MultimodalModel": (_phi4_multimodal, _PHI4_INPUTS),
}
"""How each class merges, and the arguments that it takes for it."""


def merge_images(decoder: Any, arguments: dict[str, Any]) -> Tensor | None:
    """Replace pixels among a decoder's arguments by embeddings with their features; which tokens are visual."""
    merge, names = MERGERS.get(type(decoder).__name__, (None, ()))
    images = {name: value for name in names if (value := arguments.pop(name, None)) is not None}
    if merge is None or not images:
        return None
    input_ids, embeds = arguments.pop("input_ids", None), arguments.get("inputs_embeds")
    if embeds is None:
        embeds = decoder.get_input_embeddings()(input_ids)
    arguments["inputs_embeds"], mask = merge(decoder, input_ids, embeds, images)
    return mask
