"""Vision tower, projector and text decoder put together as LLaVA does it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import transformers as hf

from tests.conformance.configs import tiny, tiny_tower
from tests.conformance.images import fitted, patches, pixels, sized_pixels, tiles
from tests.families import HEAD_DIM, IMAGE, VIDEO, Family, VisualMaker

__all__ = ["LLAVA_LIKE", "ids_of", "vlm"]

_IDS = {
    "image_token_id": IMAGE,
    "image_token_index": IMAGE,
    "video_token_id": VIDEO,
    "video_token_index": VIDEO,
}


def ids_of(config: type[hf.PreTrainedConfig]) -> dict[str, int]:
    """The ids of placeholders under the names that a configuration has for them."""
    names = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in _IDS.items() if name in names}


def vlm(
    name: str,
    model: str,
    text: Callable[[], Any],
    tower: Callable[[], Any] | None,
    image: VisualMaker,
    flags: dict[str, Any] | None = None,
    video: VisualMaker | None = None,
    **settings: Any,
) -> Family:
    """A family of a class whose configuration holds a text and a vision configuration."""
    model_class = getattr(hf, model)
    config_class = model_class.config_class

    def config() -> Any:
        parts = {"text_config": text()} | ({} if tower is None else {"vision_config": tower()})
        tied = {"tie_word_embeddings": getattr(parts["text_config"], "tie_word_embeddings", False)}
        return config_class(**(parts | ids_of(config_class) | tied | settings))

    return Family(name, model_class, config, image, video, **(flags or {}))


_LLAMA = functools.partial(tiny, hf.LlamaConfig)
_QWEN2 = functools.partial(tiny, hf.Qwen2Config)
_QWEN3 = functools.partial(tiny, hf.Qwen3Config)
_MISTRAL = functools.partial(tiny, hf.MistralConfig, sliding_window=None)
_SLIDING_MISTRAL = functools.partial(tiny, hf.MistralConfig, sliding_window=8)
_GEMMA = functools.partial(tiny, hf.GemmaConfig, tie_word_embeddings=True)
_ALTERNATING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
_GEMMA2 = functools.partial(tiny, hf.Gemma2Config, tie_word_embeddings=True, **_ALTERNATING)
_COHERE2 = functools.partial(tiny, hf.Cohere2Config, tie_word_embeddings=True, logit_scale=0.5, **_ALTERNATING)
_GRANITE = functools.partial(tiny, hf.GraniteConfig, residual_multiplier=0.5, embedding_multiplier=2.0)

_CLIP = functools.partial(tiny_tower, hf.CLIPVisionConfig, patch=8)
_TILE_CLIP = functools.partial(tiny_tower, hf.CLIPVisionConfig, side=16, patch=8)
_SIGLIP = functools.partial(tiny_tower, hf.SiglipVisionConfig, patch=8)
_TILE_SIGLIP = functools.partial(tiny_tower, hf.SiglipVisionConfig, side=16, patch=8)
_PIXTRAL = functools.partial(tiny_tower, hf.PixtralVisionConfig, side=32, patch=8, head_dim=HEAD_DIM)
_INTERN = functools.partial(tiny_tower, hf.InternVLVisionConfig, image_size=[24, 24], patch_size=[4, 4])
_IDEFICS2 = functools.partial(tiny_tower, hf.Idefics2VisionConfig, patch=8)
_IDEFICS3 = functools.partial(tiny_tower, hf.Idefics3VisionConfig)
_GOT = functools.partial(
    tiny_tower,
    hf.models.got_ocr2.GotOcr2VisionConfig,
    patch=2,
    output_channels=16,
    window_size=4,
    global_attn_indexes=[1],
    mlp_dim=48,
)

_PLAIN = fitted(pixels(24), marked=False)
_MARKED = fitted(pixels(24))
_TILES = fitted(tiles(16), marked=False)
_PINPOINTS: dict[str, Any] = {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]}
_SIZES = sized_pixels((24, 24), (16, 32), (32, 24))
_SLIDES = {"has_sliding_layers": True}
_NEWLINES = {"has_newlines": True}
_SPLIT = fitted(pixels(24, pixel_attention_mask=1), per_row=True)
_PREFIX = {"type_ids": "token_type_ids", "has_bidirectional_prefix": True}
_PER_ROW = {"tower_per_row": True}

_LLAVA, _NEXT, _INTERNVL = (
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "InternVLForConditionalGeneration",
)

_ALL = (
    vlm("llava_qwen2", _LLAVA, _QWEN2, _CLIP, _PLAIN),
    vlm("llava_mistral", _LLAVA, _SLIDING_MISTRAL, _CLIP, _PLAIN, _SLIDES),
    vlm(
        "llava_siglip", _LLAVA, _QWEN2, _SIGLIP, _PLAIN, vision_feature_select_strategy="full", vision_feature_layer=-1
    ),
    vlm(
        "pixtral",
        _LLAVA,
        _MISTRAL,
        _PIXTRAL,
        fitted(_SIZES),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    ),
    vlm("llava_next_llama", _NEXT, _LLAMA, _TILE_CLIP, _TILES, _NEWLINES, **_PINPOINTS),
    vlm("llava_next_qwen2", _NEXT, _QWEN2, _TILE_CLIP, _TILES, _NEWLINES, **_PINPOINTS),
    vlm(
        "granite_vision",
        _NEXT,
        _GRANITE,
        _TILE_SIGLIP,
        _TILES,
        _NEWLINES,
        vision_feature_select_strategy="full",
        vision_feature_layer=[-2, -1],
        **_PINPOINTS,
    ),
    vlm(
        "llava_next_video",
        "LlavaNextVideoForConditionalGeneration",
        _LLAMA,
        _TILE_CLIP,
        _TILES,
        _NEWLINES,
        fitted(pixels(16, "pixel_values_videos", (2,)), "video"),
        spatial_pool_stride=1,
        **_PINPOINTS,
    ),
    vlm(
        "llava_onevision",
        "LlavaOnevisionForConditionalGeneration",
        _QWEN2,
        _TILE_SIGLIP,
        _TILES,
        _NEWLINES,
        **_PINPOINTS,
    ),
    vlm("vipllava", "VipLlavaForConditionalGeneration", _LLAMA, _CLIP, _PLAIN, vision_feature_layer=[-2, -1]),
    vlm(
        "aya_vision",
        "AyaVisionForConditionalGeneration",
        _COHERE2,
        functools.partial(_SIGLIP, patch=4),
        _MARKED,
        _SLIDES | {"is_parallel": True},
    ),
    vlm("internvl_qwen3", _INTERNVL, _QWEN3, _INTERN, _MARKED),
    vlm("internvl_llama", _INTERNVL, _LLAMA, _INTERN, _MARKED),
    vlm("paligemma", "PaliGemmaForConditionalGeneration", _GEMMA, _SIGLIP, _PLAIN, _PREFIX, projection_dim=64),
    vlm(
        "paligemma2",
        "PaliGemmaForConditionalGeneration",
        _GEMMA2,
        _SIGLIP,
        _PLAIN,
        _PREFIX | _SLIDES | {"eager_only": True},
        projection_dim=64,
    ),
    vlm("got_ocr2", "GotOcr2ForConditionalGeneration", _QWEN2, _GOT, _MARKED),
    vlm(
        "idefics2",
        "Idefics2ForConditionalGeneration",
        _MISTRAL,
        _IDEFICS2,
        _SPLIT,
        _PER_ROW,
        perceiver_config={
            "hidden_size": 64,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "num_key_value_heads": 1,
        },
    ),
    vlm("idefics3", "Idefics3ForConditionalGeneration", _LLAMA, _IDEFICS3, _SPLIT, _PER_ROW),
    vlm(
        "lighton_ocr",
        "LightOnOcrForConditionalGeneration",
        _QWEN3,
        _PIXTRAL,
        fitted(sized_pixels((32, 32), (16, 32))),
        spatial_merge_size=2,
    ),
    vlm("deepseek_vl", "DeepseekVLForConditionalGeneration", _LLAMA, _SIGLIP, _MARKED),
    vlm(
        "aria",
        "AriaForConditionalGeneration",
        functools.partial(tiny, hf.AriaTextConfig, moe_num_shared_experts=1),
        functools.partial(tiny_tower, hf.Idefics3VisionConfig, patch=8),
        _MARKED,
        projector_patch_to_query_dict={9: 4},
    ),
    vlm(
        "fuyu",
        "FuyuForCausalLM",
        functools.partial(tiny, hf.PersimmonConfig),
        None,
        fitted(patches(9, 48)),
        patch_size=4,
    ),
)
LLAVA_LIKE: dict[str, Family] = {family.name: family for family in _ALL}
