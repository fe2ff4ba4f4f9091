"""Classes whose images pass a Q-Former: as many tokens of each as it has queries."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import transformers as hf
from torch import Tensor
from transformers import models

from tests.conformance.configs import tiny, tiny_tower
from tests.conformance.images import fitted, pixels, tiles
from tests.conformance.llava_like import vlm
from tests.families import HIDDEN, Family

__all__ = ["Q_FORMERS"]

_LLAMA = functools.partial(tiny, hf.LlamaConfig)
_NEEDS_IMAGE = {"needs_image": True}
_MARKED = fitted(pixels(24))
_QFORMER = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "encoder_hidden_size": 32,
}


def _asked(*frames: int) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    """InstructBLIP's Q-Former reads the question, too; a video has frames."""

    def make(variant: int, generator: torch.Generator) -> dict[str, Tensor]:
        question = torch.randint(4, 32, (1, 3), generator=generator)
        tensors = {"qformer_input_ids": question, "qformer_attention_mask": torch.ones_like(question)}
        return pixels(24, frames=frames)(variant, generator) | tensors

    return make


_ALL = (
    vlm(
        "blip2_opt",
        "Blip2ForConditionalGeneration",
        functools.partial(tiny, hf.OPTConfig, ffn_dim=96, word_embed_proj_dim=HIDDEN, tie_word_embeddings=True),
        functools.partial(tiny_tower, hf.Blip2VisionConfig, patch=8),
        _MARKED,
        _NEEDS_IMAGE,
        qformer_config=_QFORMER,
        num_query_tokens=5,
    ),
    vlm(
        "blip2_llama",
        "Blip2ForConditionalGeneration",
        _LLAMA,
        functools.partial(tiny_tower, hf.Blip2VisionConfig, patch=8),
        _MARKED,
        _NEEDS_IMAGE,
        qformer_config=_QFORMER,
        num_query_tokens=5,
    ),
    vlm(
        "instructblip_llama",
        "InstructBlipForConditionalGeneration",
        _LLAMA,
        functools.partial(tiny_tower, hf.InstructBlipVisionConfig, patch=8),
        fitted(_asked()),
        _NEEDS_IMAGE,
        qformer_config=_QFORMER,
        num_query_tokens=5,
    ),
    vlm(
        "instructblipvideo_llama",
        "InstructBlipVideoForConditionalGeneration",
        functools.partial(tiny, hf.LlamaConfig),
        functools.partial(tiny_tower, hf.InstructBlipVideoVisionConfig, patch=8),
        fitted(_asked(4), "video"),
        _NEEDS_IMAGE | {"images_are_videos": True},
        num_query_tokens=5,
        qformer_config=_QFORMER,
    ),
    vlm(
        "granite4_vision",
        "Granite4VisionForConditionalGeneration",
        functools.partial(
            tiny, models.granite4_vision.configuration_granite4_vision.Granite4VisionTextConfig, residual_multiplier=0.5
        ),
        functools.partial(tiny_tower, hf.CLIPVisionConfig, side=16, patch=4, num_hidden_layers=3, hidden_size=64),
        fitted(tiles(16), marked=False),
        {"has_newlines": True, "has_deepstack": True},
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
        downsample_rate="1/2",
        deepstack_layer_map=[[1, 1], [2, 0]],
        spatial_vision_layer=-1,
        spatial_target_layers=[1, 2, 2, 1],
        qformer_config={
            "model_type": "blip_2_qformer",
            **_QFORMER,
            "num_hidden_layers": 1,
            "cross_attention_frequency": 1,
            "use_qformer_text_input": False,
            "max_position_embeddings": 64,
        },
    ),
)
Q_FORMERS: dict[str, Family] = {family.name: family for family in _ALL}
