"""Classes that merge images into the prompt in a way of their own, most of them as codes of the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

from tests.conformance.configs import tiny, tiny_tower
from tests.conformance.images import fitted, pixels, sized_pixels
from tests.families import END, HEADS, IMAGE, START, Family, Visual

__all__ = ["MERGING"]

# Chameleon and Emu3 read their images as text: the id of each image code in the vocabulary.
_CODES = 32
_LETTERS = "ABCDEFGHIJ"
_CHAMELEON_MAP = {"<image>": IMAGE} | {f"IMGIMG{_LETTERS[n // 10]}{_LETTERS[n % 10]}Z": 64 + n for n in range(_CODES)}
_EMU3_MAP = {"<image>": IMAGE, "<|extra_200|>": 8} | {f"<|visual token {n:06d}|>": 64 + n for n in range(_CODES)}


_VQ: dict[str, Any] = {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1, "embed_dim": 8}


def _chameleon() -> Any:
    vq = _VQ | {"num_embeddings": _CODES, "latent_channels": 32, "resolution": 8}
    return tiny(hf.ChameleonConfig, num_key_value_heads=HEADS, vq_config=vq, vocabulary_map=_CHAMELEON_MAP)


def _emu3() -> Any:
    vq = _VQ | {"codebook_size": _CODES, "latent_channels": 8, "hidden_size": 64, "attn_resolutions": []}
    return hf.Emu3Config(text_config=tiny(hf.Emu3TextConfig), vq_config=vq, vocabulary_map=_EMU3_MAP)


def _phi4_multimodal() -> Any:
    vision = tiny_tower(hf.Phi4MultimodalVisionConfig, side=16, crop_size=16, image_token_id=IMAGE)
    audio = hf.Phi4MultimodalAudioConfig(
        hidden_size=16, intermediate_size=16, num_blocks=1, num_attention_heads=2, ext_pw_out_channel=16,
        depthwise_separable_out_channel=16, nemo_conv_channels=16, input_size=16,
    )  # fmt: skip
    return tiny(hf.Phi4MultimodalConfig, vision_config=vision, audio_config=audio)


def _phi4_image(model: nn.Module, variant: int, generator: torch.Generator) -> Visual:
    """The whole image and one crop of 4 x 4 patches, pooled to 2 x 2 with a separator per row, one between them."""
    tensors = {
        "image_pixel_values": torch.randn(1, 2, 3, 16, 16, generator=generator),
        "image_sizes": torch.tensor([[16, 16]]),
        "image_attention_mask": torch.ones(1, 2, 4, 4, dtype=torch.bool),
    }
    return Visual([START, *[IMAGE] * (6 + 1 + 6), END], tensors)


_ALL = (
    Family("phi4_multimodal", hf.Phi4MultimodalForCausalLM, _phi4_multimodal, _phi4_image),
    Family("chameleon", hf.ChameleonForConditionalGeneration, _chameleon, fitted(pixels(8))),
    Family("emu3", hf.Emu3ForConditionalGeneration, _emu3, fitted(sized_pixels((8, 8)))),
)
MERGING: dict[str, Family] = {family.name: family for family in _ALL}
