"""Decoders with recurrent or convolutional layers, in place of attention or beside it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers import models

from tests.conformance.configs import LINEAR, QWEN_TOWER, tiny, tiny_tower
from tests.conformance.images import fitted, grid_image
from tests.conformance.llava_like import vlm
from tests.conformance.text_only import text
from tests.families import IMAGE, VIDEO, Family, _qwen3_video

__all__ = ["HYBRID"]

_MROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [2, 3, 3],
    "mrope_interleaved": True,
    "partial_rotary_factor": 1.0,
}
_QWEN: dict[str, Any] = {"type_ids": "mm_token_type_ids", "has_mrope": True}
_MINICPM_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
                  "patch_size": 4, "image_size": 24, "insert_layer_id": 1}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2}
_LFM_TOWER = functools.partial(tiny_tower, hf.Siglip2VisionConfig, num_patches=36)
_LFM3_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
               "patch_size": 4, "num_key_value_heads": 2}  # fmt: skip


def _masked_patches(variant: int, generator: torch.Generator) -> dict[str, Tensor]:
    """LFM2-VL: (1, 36, 48), zeros behind those of the picture, which `spatial_shapes` has."""
    height, width = [(6, 6), (4, 8)][variant % 2]
    image, mask = torch.zeros(1, 36, 48), torch.zeros(1, 36, dtype=torch.long)
    image[0, : height * width] = torch.randn(height * width, 48, generator=generator)
    mask[0, : height * width] = 1
    return {"pixel_values": image, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[height, width]])}


def _qwen(name: str, model: str, module: str, config: str) -> Family:
    text_config = functools.partial(tiny, getattr(getattr(models, module), config), rope_parameters=_MROPE, **LINEAR)
    return vlm(name, model, text_config, lambda: QWEN_TOWER, fitted(grid_image(96)), _QWEN, _qwen3_video)


def _minicpm(name: str, model: str, flags: dict[str, Any] | None = None, **rotary: Any) -> Family:
    text_config = functools.partial(tiny, models.qwen3_5.Qwen3_5TextConfig, **LINEAR, **rotary)
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    return vlm(
        name, model, text_config, lambda: _MINICPM_TOWER, fitted(_strip), flags, insert_layer_id=1, **ids
    )  # fmt: skip


def _strip(variant: int, generator: torch.Generator) -> dict[str, Tensor]:
    """MiniCPM-V: the patches of all images side by side, (1, 3, 4, 4 x patches), and their rows and columns."""
    height, width = [(8, 8), (4, 8)][variant % 2]
    return {
        "pixel_values": torch.randn(1, 3, 4, 4 * height * width, generator=generator),
        "target_sizes": torch.tensor([[height, width]]),
    }


_ALL = (
    _qwen("qwen3_5", "Qwen3_5ForConditionalGeneration", "qwen3_5", "Qwen3_5TextConfig"),
    _qwen("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", "Qwen3_5MoeTextConfig"),
    vlm("lfm2_vl", "Lfm2VlForConditionalGeneration", functools.partial(tiny, hf.Lfm2Config, **_CONVOLUTIONS),
        _LFM_TOWER, fitted(_masked_patches), projector_hidden_size=32),
    vlm("lfm3_vl_convolutions", "Lfm3VlForConditionalGeneration",
        functools.partial(tiny, hf.Lfm3Config, **_CONVOLUTIONS), lambda: _LFM3_TOWER, fitted(grid_image(96)),
        projector_hidden_size=48),
    _minicpm("minicpmv4_6", "MiniCPMV4_6ForConditionalGeneration"),
    _minicpm("minicpmv4_7", "MiniCPMV4_7ForConditionalGeneration", _QWEN, rope_parameters=_MROPE),
    _minicpm("minicpm_ocr", "MiniCPMOcrForConditionalGeneration"),
    text("lfm2", "Lfm2ForCausalLM", **_CONVOLUTIONS),
    text("lfm2_moe", "Lfm2MoeForCausalLM", **_CONVOLUTIONS),
    text("qwen3_next", "Qwen3NextForCausalLM", **LINEAR),
    text("jamba", "JambaForCausalLM", attn_layer_period=2, attn_layer_offset=1),
    text("granitemoehybrid", "GraniteMoeHybridForCausalLM", layer_types=["mamba", "attention"] * 2,
         shared_intermediate_size=32, **_MAMBA),
    text("olmo_hybrid", "OlmoHybridForCausalLM"),
    text("bamba", "BambaForCausalLM", attn_layer_indices=[1, 3], **_MAMBA),
    text("falcon_h1", "FalconH1ForCausalLM", mamba_d_ssm=128, **_MAMBA),
    text("nemotron_h", "NemotronHForCausalLM", mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=16,
         moe_intermediate_size=32, moe_shared_expert_intermediate_size=32),
)  # fmt: skip
HYBRID: dict[str, Family] = {family.name: dataclasses.replace(family, has_states=True) for family in _ALL}
