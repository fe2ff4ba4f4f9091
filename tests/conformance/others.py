"""Classes that put vision and text together in their own ways."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers import models

from tests.conformance.configs import tiny, tiny_tower
from tests.conformance.images import fitted, grid_image, grid_video, pixels, placed_patches, sized_pixels, tiles
from tests.conformance.llava_like import vlm
from tests.families import END, HEADS, HIDDEN, IMAGE, START, VOCAB, Family, Visual

__all__ = ["OTHERS"]

_LLAMA = functools.partial(tiny, hf.LlamaConfig)
_QWEN2 = functools.partial(tiny, hf.Qwen2Config)
_SLIDES = {"has_sliding_layers": True}
_NEEDS_IMAGE = {"needs_image": True}
_ABSOLUTE = {"has_absolute_positions": True}
_MARKED = fitted(pixels(24))
_CLIP = functools.partial(tiny_tower, hf.CLIPVisionConfig, patch=8)
_QFORMER = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "encoder_hidden_size": 32,
}


def _asked(variant: int, generator: torch.Generator) -> dict[str, Tensor]:
    """InstructBLIP's Q-Former reads the question, too."""
    question = torch.randint(4, 32, (1, 3), generator=generator)
    tensors = {"qformer_input_ids": question, "qformer_attention_mask": torch.ones_like(question)}
    return pixels(24)(variant, generator) | tensors


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


def _tile(variant: int, generator: torch.Generator) -> dict[str, Tensor]:
    return pixels(24)(variant, generator) | {"pixel_attention_mask": torch.ones(1, dtype=torch.bool)}


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
        fitted(_asked),
        _NEEDS_IMAGE,
        qformer_config=_QFORMER,
        num_query_tokens=5,
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
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"] * 2,
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
)
OTHERS: dict[str, Family] = {family.name: family for family in _ALL}
