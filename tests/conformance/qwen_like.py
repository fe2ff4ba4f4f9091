"""Classes that take flattened patches with a grid, most of them with multi-axis rotary positions."""

from __future__ import annotations

import functools
from typing import Any

import transformers as hf
from transformers import models

from tests.conformance.configs import tiny
from tests.conformance.images import fitted, grid_image, grid_video
from tests.conformance.llava_like import vlm
from tests.families import END, HIDDEN, START, Family, _qwen3_video

__all__ = ["QWEN_LIKE"]

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_INTERLEAVED = _MROPE | {"mrope_interleaved": True}
_MARKS = {"vision_start_token_id": START, "vision_end_token_id": END}
_IMAGE_MARKS = {"image_start_token_id": START, "image_end_token_id": END}
_TOWER: dict[str, Any] = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4}
_WINDOWS = _TOWER | {"out_hidden_size": HIDDEN, "window_size": 16, "fullatt_block_indexes": [1]}
_DEEPSTACK = _TOWER | {
    "depth": 3,
    "out_hidden_size": HIDDEN,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 1],
}
_GLM_TOWER = _TOWER | {"out_hidden_size": HIDDEN, "image_size": 24}

_IMAGE = fitted(grid_image(96))
_VIDEO = fitted(grid_video(96), "video")
_FLAGS: dict[str, Any] = {"has_mrope": True}
_TYPED = _FLAGS | {"type_ids": "mm_token_type_ids"}
_SLIDES = {"has_sliding_layers": True}


def _text(module: Any, name: str, **settings: Any) -> Any:
    return functools.partial(tiny, getattr(module, name), **settings)


def _glm(name: str, model: str, module: Any, **settings: Any) -> Family:
    prefix = model.removesuffix("ForConditionalGeneration")
    text = _text(module, f"{prefix}TextConfig", rope_parameters=_MROPE | {"partial_rotary_factor": 1.0}, **settings)
    return vlm(name, model, text, lambda: _GLM_TOWER, _IMAGE, _TYPED, **_IMAGE_MARKS)


_ALL = (
    vlm(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        _text(models.qwen2_vl, "Qwen2VLTextConfig", rope_parameters=_MROPE),
        lambda: {"depth": 2, "embed_dim": 32, "hidden_size": HIDDEN, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
        _IMAGE,
        _TYPED,
        _VIDEO,
        **_MARKS,
    ),
    vlm(
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        _text(models.qwen3_vl_moe, "Qwen3VLMoeTextConfig", rope_parameters=_INTERLEAVED),
        lambda: _DEEPSTACK,
        _IMAGE,
        _TYPED | {"has_deepstack": True},
        _qwen3_video,
        **_MARKS,
    ),
    vlm(
        "qwen2_5_omni_thinker",
        "Qwen2_5OmniThinkerForConditionalGeneration",
        _text(models.qwen2_5_omni, "Qwen2_5OmniTextConfig", rope_parameters=_MROPE),
        lambda: _WINDOWS,
        _IMAGE,
        _FLAGS,
        **_MARKS,
        audio_config={
            "num_mel_bins": 8,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "d_model": 16,
            "n_window": 4,
            "output_dim": HIDDEN,
        },
    ),
    vlm(
        "qwen3_omni_moe_thinker",
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        _text(models.qwen3_omni_moe, "Qwen3OmniMoeTextConfig", rope_parameters=_INTERLEAVED),
        lambda: _DEEPSTACK,
        _IMAGE,
        _FLAGS | {"has_deepstack": True},
        **_MARKS,
        audio_config={
            "num_mel_bins": 8,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "d_model": 16,
            "n_window": 4,
            "output_dim": HIDDEN,
            "downsample_hidden_size": 8,
        },
    ),
    _glm("glm4v", "Glm4vForConditionalGeneration", models.glm4v),
    _glm("glm4v_moe", "Glm4vMoeForConditionalGeneration", models.glm4v_moe),
    vlm(
        "glm46v",
        "Glm46VForConditionalGeneration",
        _text(models.glm4v, "Glm4vTextConfig", rope_parameters=_MROPE | {"partial_rotary_factor": 1.0}),
        lambda: models.glm4v.Glm4vVisionConfig(**_GLM_TOWER),
        _IMAGE,
        _TYPED,
        **_IMAGE_MARKS,
    ),
    _glm("glm_ocr", "GlmOcrForConditionalGeneration", models.glm_ocr),
    vlm(
        "exaone4_5",
        "Exaone4_5_ForConditionalGeneration",
        functools.partial(
            tiny, hf.Exaone4Config, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2
        ),
        lambda: _WINDOWS | {"num_key_value_heads": 1},
        _IMAGE,
        _SLIDES,
        _VIDEO,
    ),
    vlm(
        "video_llama_3",
        "VideoLlama3ForConditionalGeneration",
        functools.partial(tiny, hf.Qwen2Config),
        lambda: {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 4,
        },
        fitted(grid_image(48, image_merge_sizes=[2])),
    ),
    vlm(
        "kimi_k25",
        "Kimi_K25ForConditionalGeneration",
        functools.partial(tiny, hf.DeepseekV3Config, num_key_value_heads=4),
        lambda: {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 4,
            "pos_emb_height": 8,
            "pos_emb_width": 8,
        },
        fitted(grid_image(3, 4, 4)),
        {"seed": 1},
        projection_hidden_size=32,
    ),
    vlm(
        "paddleocr_vl",
        "PaddleOCRVLForConditionalGeneration",
        _text(models.paddleocr_vl, "PaddleOCRTextConfig", rope_parameters=_MROPE),
        lambda: {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 4,
            "image_size": 24,
        },
        fitted(grid_image(3, 4, 4)),
        _TYPED,
        **_MARKS,
    ),
    vlm(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeForConditionalGeneration",
        _text(
            models.ernie4_5_vl_moe,
            "Ernie4_5_VLMoeTextConfig",
            moe_intermediate_size=[32, 32],
            rope_parameters=_MROPE | {"mrope_section": [3, 3, 2]},
        ),
        lambda: {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4},
        fitted(grid_image(48)),
        _FLAGS | {"type_ids": "mm_token_type_ids moe_mm_token_type_ids"},
        image_start_token_id=START,
        image_end_token_id=END,
    ),
    vlm(
        "hunyuan_vl",
        "HunYuanVLForConditionalGeneration",
        _text(
            models.hunyuan_vl,
            "HunYuanVLTextConfig",
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2, 2]},
        ),
        lambda: {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 4,
            "out_hidden_size": HIDDEN,
            "text_hidden_size": HIDDEN,
            "max_image_size": 32,
        },
        fitted(grid_image(48)),
        _TYPED | {"has_batch_positions": True},
    ),
)
QWEN_LIKE: dict[str, Family] = {family.name: family for family in _ALL}
