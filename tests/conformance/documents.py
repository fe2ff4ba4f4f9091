"""Classes made to read documents."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers import models

from tests.conformance.configs import tiny, tiny_tower
from tests.conformance.images import fitted, pixels
from tests.conformance.llava_like import vlm
from tests.families import HIDDEN, Family

__all__ = ["DOCUMENTS", "SAM"]

_MARKED = fitted(pixels(24))
SAM: dict[str, Any] = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 4,
    "window_size": 4,
    "global_attn_indexes": [1],
    "mlp_dim": 48,
    "downsample_channels": [16, 32],
}


def _tile(variant: int, generator: torch.Generator) -> dict[str, Tensor]:
    return pixels(24)(variant, generator) | {"pixel_attention_mask": torch.ones(1, dtype=torch.bool)}


_ALL = (
    vlm(
        "granite_docling",
        "GraniteDoclingForConditionalGeneration",
        functools.partial(
            tiny,
            models.granite_docling.configuration_granite_docling.GraniteDoclingTextConfig,
            tie_word_embeddings=True,
        ),
        functools.partial(
            tiny_tower,
            models.granite_docling.configuration_granite_docling.GraniteDoclingVisionConfig,
            out_hidden_size=HIDDEN,
            scale_factor=2,
            deepstack_visual_indexes=[0],
        ),
        fitted(_tile, per_row=True),
        {"tower_per_row": True, "has_deepstack": True},
        pad_token_id=0,
    ),
    vlm(
        "qianfan_ocr",
        "QianfanOCRForConditionalGeneration",
        functools.partial(tiny, hf.Qwen3Config),
        functools.partial(
            tiny_tower,
            models.qianfan_ocr.configuration_qianfan_ocr.QianfanOCRVisionConfig,
            image_size=[24, 24],
            patch_size=[4, 4],
            drop_path_rate=0.0,
        ),
        _MARKED,
    ),
    vlm(
        "deepseek_ocr2",
        "DeepseekOcr2ForConditionalGeneration",
        functools.partial(
            tiny,
            models.deepseek_ocr2.configuration_deepseek_ocr2.DeepseekOcr2TextConfig,
            mlp_layer_types=["dense", *["sparse"] * 3],
        ),
        lambda: {
            "sam_config": SAM,
            "encoder_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "vocab_size": 8,
            },
        },
        fitted(pixels(64), marked=False),
    ),
)
DOCUMENTS: dict[str, Family] = {family.name: family for family in _ALL}
