"""Classes that put vision and text together in their own ways."""

from __future__ import annotations

import functools

import torch
import transformers as hf
from torch import Tensor
from transformers import models

from tests.conformance.configs import tiny, tiny_tower
from tests.conformance.images import fitted, grid_image, grid_video, pixels, placed_patches
from tests.conformance.llava_like import vlm
from tests.conformance.text_only import SHARED, SHARES
from tests.families import END, HIDDEN, IMAGE, START, VOCAB, Family

__all__ = ["OTHERS"]

_LLAMA = functools.partial(tiny, hf.LlamaConfig)
_QWEN2 = functools.partial(tiny, hf.Qwen2Config)
_SLIDES = {"has_sliding_layers": True}
_ALTERNATING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
_NEEDS_IMAGE = {"needs_image": True}
_ABSOLUTE = {"has_absolute_positions": True}
_MARKED = fitted(pixels(24))
_CLIP = functools.partial(tiny_tower, hf.CLIPVisionConfig, patch=8)


def _two_sizes(variant: int, generator: torch.Generator) -> dict[str, Tensor]:
    """DeepSeek-VL hybrid: the same image twice, the larger for a tower of its own."""
    return pixels(24)(variant, generator) | pixels(32, "high_res_pixel_values")(variant, generator)


_MOLMO2_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def _pooled(variant: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Molmo 2: one crop of 9 patches, each token pools three of them."""
    return {
        "pixel_values": torch.randn(1, 9, 48, generator=generator),
        "image_token_pooling": torch.arange(9).view(3, 3),
        "image_grids": torch.tensor([[0, 0, 1, 3]]),
    }


_ALL = (
    vlm(
        "llama4",
        "Llama4ForConditionalGeneration",
        functools.partial(
            tiny,
            models.llama4.Llama4TextConfig,
            intermediate_size_mlp=96,
            num_experts_per_tok=1,
            attention_chunk_size=8,
        ),
        functools.partial(
            tiny_tower,
            models.llama4.Llama4VisionConfig,
            intermediate_size=128,
            vision_output_dim=48,
            projector_input_dim=48,
            projector_output_dim=48,
        ),
        fitted(pixels(24)),
    ),
    vlm(
        "molmo2",
        "Molmo2ForConditionalGeneration",
        functools.partial(tiny, models.molmo2.configuration_molmo2.Molmo2TextConfig, additional_vocab_size=8),
        lambda: _MOLMO2_TOWER | {"image_size": [12, 12], "patch_size": 4, "num_hidden_layers": 2},
        fitted(_pooled),
        {"type_ids": "mm_token_type_ids", "has_bidirectional_images": True},
        adapter_config=_MOLMO2_TOWER
        | {"vision_feature_layer": [-1, 0], "text_hidden_size": HIDDEN, "intermediate_size": 96},
        image_patch_id=IMAGE,
    ),
    vlm(
        "perception_lm",
        "PerceptionLMForConditionalGeneration",
        _LLAMA,
        functools.partial(_CLIP, model_args={"embed_dim": 32}),
        fitted(pixels(24, frames=(1,))),
    ),
    vlm(
        "fast_vlm",
        "FastVlmForConditionalGeneration",
        _QWEN2,
        lambda: hf.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 32], depths=[1, 1], layer_type="basic", hidden_size=32, image_size=24
        ),
        _MARKED,
        {"eager_only": True},
    ),
    vlm(
        "janus",
        "JanusForConditionalGeneration",
        _LLAMA,
        functools.partial(
            tiny_tower,
            models.janus.JanusVisionConfig,
            patch=8,
            projection_dim=HIDDEN,
            mlp_ratio=1.5,
            num_image_tokens=9,
        ),
        _MARKED,
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 16,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "projection_dim": HIDDEN,
            "image_token_embed_dim": HIDDEN,
        },
    ),
    vlm(
        "deepseek_vl_hybrid",
        "DeepseekVLHybridForConditionalGeneration",
        _LLAMA,
        functools.partial(tiny_tower, hf.SiglipVisionConfig, patch=8),
        fitted(_two_sizes),
        high_res_vision_config=hf.SamVisionConfig(
            hidden_size=32,
            output_channels=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=4,
            window_size=4,
            global_attn_indexes=[1],
            mlp_dim=48,
        ),
    ),
    vlm(
        "hyperclovax_vision_v2",
        "HyperCLOVAXVisionV2ForConditionalGeneration",
        functools.partial(tiny, hf.HyperCLOVAXConfig),
        lambda: models.qwen2_5_vl.Qwen2_5_VLVisionConfig(
            depth=2,
            hidden_size=32,
            intermediate_size=48,
            num_heads=2,
            patch_size=4,
            out_hidden_size=HIDDEN,
            window_size=16,
            fullatt_block_indexes=[1],
        ),
        fitted(grid_image(96)),
        video=fitted(grid_video(96), "video"),
    ),
    vlm(
        "step3p7",
        "Step3p7ForConditionalGeneration",
        functools.partial(
            tiny, models.step3p7.configuration_step3p7.Step3p7TextConfig, share_expert_dim=32, sliding_window=8
        ),
        functools.partial(tiny_tower, models.step3p7.configuration_step3p7.Step3p7VisionConfig),
        _MARKED,
        _SLIDES,
    ),
    vlm(
        "gemma4",
        "Gemma4ForConditionalGeneration",
        functools.partial(
            tiny,
            models.gemma4.configuration_gemma4.Gemma4TextConfig,
            num_hidden_layers=4,
            tie_word_embeddings=True,
            **_ALTERNATING,
            hidden_size_per_layer_input=16,
            vocab_size_per_layer_input=VOCAB,
        ),
        lambda: {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 4,
            "position_embedding_size": 36,
        },
        fitted(placed_patches(48)),
        _SLIDES | {"type_ids": "mm_token_type_ids", "seed": 1},
        audio_config=None,
        boi_token_id=START,
        eoi_token_id=END,
    ),
    vlm(
        "gemma4_shared",
        "Gemma4ForConditionalGeneration",
        functools.partial(
            tiny,
            models.gemma4.configuration_gemma4.Gemma4TextConfig,
            tie_word_embeddings=True,
            **SHARED,
            use_double_wide_mlp=True,
            hidden_size_per_layer_input=16,
            vocab_size_per_layer_input=VOCAB,
        ),
        lambda: {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 4,
            "position_embedding_size": 36,
        },
        fitted(placed_patches(48)),
        _SLIDES | SHARES | {"type_ids": "mm_token_type_ids", "seed": 3},
        audio_config=None,
        boi_token_id=START,
        eoi_token_id=END,
    ),
    vlm(
        "ovis2",
        "Ovis2ForConditionalGeneration",
        functools.partial(tiny, hf.Qwen2Config, tie_word_embeddings=True),
        functools.partial(
            tiny_tower,
            models.ovis2.configuration_ovis2.Ovis2VisionConfig,
            patch=8,
            vocab_size=24,
            hidden_stride=1,
            num_visual_indicator_tokens=5,
        ),
        fitted(pixels(24)),
        visual_indicator_token_ids=[8, 9, 10, 11, 12],
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
    ),
    vlm(
        "gemma4_unified",
        "Gemma4UnifiedForConditionalGeneration",
        functools.partial(
            tiny,
            models.gemma4_unified.configuration_gemma4_unified.Gemma4UnifiedTextConfig,
            tie_word_embeddings=True,
            **_ALTERNATING,
        ),
        lambda: {
            "patch_size": 4,
            "pooling_kernel_size": 1,
            "mm_embed_dim": 32,
            "mm_posemb_size": 6,
            "output_proj_dims": 32,
        },
        fitted(placed_patches(48, side=3)),
        {"has_sliding_layers": True, "type_ids": "mm_token_type_ids", "has_bidirectional_images": True, "seed": 5},
        audio_config=None,
        boi_token_id=START,
        eoi_token_id=END,
    ),
)
OTHERS: dict[str, Family] = {family.name: family for family in _ALL}
