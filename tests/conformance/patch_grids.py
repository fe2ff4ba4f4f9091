"""Classes of the latest releases that take flattened patches with a grid."""

from __future__ import annotations

import functools
from typing import Any

from transformers import models

from tests.conformance.configs import tiny
from tests.conformance.images import fitted, grid_image, grid_video
from tests.conformance.llava_like import vlm
from tests.families import END, HIDDEN, START, Family, _qwen3_video

__all__ = ["PATCH_GRIDS"]

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_INTERLEAVED = _MROPE | {"mrope_interleaved": True}
_MARKS = {"vision_start_token_id": START, "vision_end_token_id": END}
_TYPED: dict[str, Any] = {"has_mrope": True, "type_ids": "mm_token_type_ids"}
_ALTERNATING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
_DEEPSTACK = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": HIDDEN,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 1],
}


_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
}

_ALL = (
    vlm(
        "cosmos3_omni",
        "Cosmos3OmniForConditionalGeneration",
        functools.partial(tiny, models.qwen3_vl.Qwen3VLTextConfig, rope_parameters=_INTERLEAVED),
        lambda: _DEEPSTACK,
        fitted(grid_image(96)),
        _TYPED | {"has_deepstack": True},
        _qwen3_video,
        **_MARKS,
    ),
    vlm(
        "cohere_compass",
        "CohereCompassForConditionalGeneration",
        functools.partial(
            tiny,
            models.cohere_compass.CohereCompassTextConfig,
            tie_word_embeddings=True,
            logit_scale=0.5,
            rope_parameters={kind: _INTERLEAVED for kind in ("sliding_attention", "full_attention")},
            **_ALTERNATING,
        ),
        lambda: _DEEPSTACK,
        fitted(grid_image(96)),
        _TYPED | {"has_deepstack": True, "has_sliding_layers": True, "is_parallel": True},
        **_MARKS,
    ),
    vlm(
        "cosmos3_edge",
        "Cosmos3EdgeForConditionalGeneration",
        functools.partial(
            tiny, models.cosmos3_edge.configuration_cosmos3_edge.Cosmos3EdgeTextConfig, rope_parameters=_MROPE
        ),
        lambda: {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 4,
            "num_patches": 36,
        },
        fitted(grid_image(48)),
        _TYPED,
        projector_hidden_size=48,
        **_MARKS,
    ),
    vlm(
        "lfm3_vl",
        "Lfm3VlForConditionalGeneration",
        functools.partial(
            tiny,
            models.lfm3.configuration_lfm3.Lfm3Config,
            layer_types=["full_attention", "sliding_attention"] * 2,
            sliding_window=8,
            tie_word_embeddings=True,
        ),
        lambda: {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "patch_size": 4,
        },
        fitted(grid_image(96)),
        {"has_sliding_layers": True},
        projector_hidden_size=48,
        **_MARKS,
    ),
    vlm(
        "muse_glimmer",
        "MuseGlimmerForConditionalGeneration",
        functools.partial(tiny, models.muse_glimmer.configuration_muse_glimmer.MuseGlimmerTextConfig, **_ALTERNATING),
        lambda: _TOWER | {"pos_emb_height": 4, "pos_emb_width": 4, "max_position_embeddings": 16},
        fitted(grid_image(96)),
        {"has_sliding_layers": True},
        fitted(grid_video(96), "video"),
        out_hidden_size=128,
        projector_hidden_size=48,
    ),
    vlm(
        "minimax_m3_vl",
        "MiniMaxM3SparseForConditionalGeneration",
        functools.partial(
            tiny,
            models.minimax_m3_vl.configuration_minimax_m3_vl.MiniMaxM3VLTextConfig,
            dense_intermediate_size=96,
            shared_intermediate_size=32,
            rotary_dim=8,
            mlp_layer_types=["dense", "sparse"] * 2,
        ),
        lambda: _TOWER | {"image_size": 24},
        fitted(grid_image(96)),
        projector_hidden_size=48,
    ),
)
PATCH_GRIDS: dict[str, Family] = {family.name: family for family in _ALL}
