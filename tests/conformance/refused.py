"""Families that cannot be pruned exactly, and the property of each that prevents it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import transformers as hf
from transformers import models

from tests.conformance.configs import tiny, tiny_tower
from tests.conformance.images import fitted, pixels
from tests.conformance.llava_like import vlm
from tests.conformance.text_only import text
from tests.families import HIDDEN, IMAGE, VIDEO, VOCAB, Family

__all__ = ["REFUSED", "Refusal"]


@dataclass(frozen=True)
class Refusal:
    """A family, what the error says (a pattern), and the reason in the words of the README."""

    family: Family
    message: str
    reason: str


_RECURRENT = "a recurrence over all tokens in some layers"
_MIXED = r"layer \d+ of .* mixes tokens by .*{}.*needs every token"
_OWN = "attention that does not go through the attention interface, so that its parts cannot be told apart"
_NOT_REGISTERED = r"layer 0 of .* mixes tokens by .*{}.*attention interface"
_IMAGE = fitted(pixels(24))
_LINEAR: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
_MROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [2, 3, 3],
    "mrope_interleaved": True,
    "partial_rotary_factor": 1.0,
}
_QWEN_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
               "out_hidden_size": HIDDEN, "num_position_embeddings": 36}  # fmt: skip
_ALTERNATING: dict[str, Any] = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
_MINICPM_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
                  "patch_size": 4, "image_size": 24, "insert_layer_id": 1}  # fmt: skip
_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
_LFM_TOWER = functools.partial(tiny_tower, hf.Siglip2VisionConfig, num_patches=36)
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2}

_ALL = (
    Refusal(
        vlm("qwen3_5", "Qwen3_5ForConditionalGeneration",
            functools.partial(tiny, models.qwen3_5.Qwen3_5TextConfig, rope_parameters=_MROPE, **_LINEAR),
            lambda: _QWEN_TOWER, _IMAGE),
        _MIXED.format("GatedDeltaNet"),
        _RECURRENT,
    ),
    Refusal(
        vlm("lfm2_vl", "Lfm2VlForConditionalGeneration", functools.partial(tiny, hf.Lfm2Config, **_CONVOLUTIONS),
            _LFM_TOWER, _IMAGE, projector_hidden_size=32),
        _MIXED.format("ShortConv"),
        "a convolution over neighbouring tokens in some layers",
    ),
    Refusal(
        vlm("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration",
            functools.partial(tiny, models.qwen3_5_moe.Qwen3_5MoeTextConfig, rope_parameters=_MROPE, **_LINEAR),
            lambda: _QWEN_TOWER, _IMAGE),
        _MIXED.format("GatedDeltaNet"),
        _RECURRENT,
    ),
    *(
        Refusal(
            vlm(name, model, functools.partial(tiny, models.qwen3_5.Qwen3_5TextConfig, **_LINEAR),
                lambda: _MINICPM_TOWER, _IMAGE, insert_layer_id=1, **_IDS),
            _MIXED.format("GatedDeltaNet"),
            _RECURRENT,
        )
        for name, model in (
            ("minicpmv4_6", "MiniCPMV4_6ForConditionalGeneration"),
            ("minicpm_ocr", "MiniCPMOcrForConditionalGeneration"),
        )
    ),
    Refusal(
        vlm("kosmos2", "Kosmos2ForConditionalGeneration",
            functools.partial(tiny, models.kosmos2.configuration_kosmos2.Kosmos2TextConfig, ffn_dim=96,
                              tie_word_embeddings=True),
            functools.partial(tiny_tower, models.kosmos2.configuration_kosmos2.Kosmos2VisionConfig, patch=8),
            _IMAGE, latent_query_num=4),
        "builds its attention mask itself",
        "an attention mask that the decoder builds itself",
    ),
    Refusal(text("lfm2", "Lfm2ForCausalLM", **_CONVOLUTIONS), _MIXED.format("ShortConv"),
            "a convolution over neighbouring tokens in some layers"),
    Refusal(text("qwen3_next", "Qwen3NextForCausalLM", **_LINEAR), _MIXED.format("GatedDeltaNet"), _RECURRENT),
    Refusal(text("diffllama", "DiffLlamaForCausalLM"), "holds 2 attention kernels",
            "two attentions per layer, subtracted from each other"),
    *(
        Refusal(text(name, model, **settings), _MIXED.format(mixer), _RECURRENT)
        for name, model, mixer, settings in (
            ("mamba", "MambaForCausalLM", "MambaMixer", {"state_size": 4}),
            ("jamba", "JambaForCausalLM", "JambaMambaMixer", {"attn_layer_period": 2, "attn_layer_offset": 1}),
            ("recurrent_gemma", "RecurrentGemmaForCausalLM", "RecurrentBlock", {}),
            ("granitemoehybrid", "GraniteMoeHybridForCausalLM", "Mamba",
             {"layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 8, "shared_intermediate_size": 32}),
            ("minimax", "MiniMaxForCausalLM", "LightningAttention",
             {"layer_types": ["linear_attention", "full_attention"] * 2}),
            ("olmo_hybrid", "OlmoHybridForCausalLM", "GatedDeltaNet", {}),
        )
    ),
    Refusal(
        text("gemma4_shared", "Gemma4ForCausalLM", tie_word_embeddings=True, hidden_size_per_layer_input=16,
             vocab_size_per_layer_input=VOCAB, num_kv_shared_layers=2, **_ALTERNATING),
        "num_kv_shared_layers=2.*keys and values of earlier layers",
        "layers that read the keys and values of earlier ones (`num_kv_shared_layers`)",
    ),
    Refusal(
        text("gemma3n", "Gemma3nForCausalLM", tie_word_embeddings=True, hidden_size_per_layer_input=16, laurel_rank=8,
             vocab_size_per_layer_input=VOCAB, num_kv_shared_layers=0, activation_sparsity_pattern=[0.0] * 4,
             **_ALTERNATING),
        r"4 residual streams at once \(AltUp\)",
        "several residual streams at once (AltUp)",
    ),
    Refusal(
        text("mllama", "MllamaForCausalLM", cross_attention_layers=[1, 3]),
        "image features outside of the token sequence",
        "cross-attention to image features: no visual tokens in the sequence",
    ),
    *(
        Refusal(text(name, model, **settings), _NOT_REGISTERED.format("Attention"), _OWN)
        for name, model, settings in (
            ("falcon", "FalconForCausalLM", {"tie_word_embeddings": True}),
            ("bloom", "BloomForCausalLM", {"tie_word_embeddings": True}),
            ("gptj", "GPTJForCausalLM", {"rotary_dim": 8}),
            ("codegen", "CodeGenForCausalLM", {"rotary_dim": 8}),
            ("gpt_neo", "GPTNeoForCausalLM", {"attention_types": [[["global", "local"], 2]]}),
            ("mpt", "MptForCausalLM", {}),
        )
    ),
)  # fmt: skip
REFUSED: dict[str, Refusal] = {refusal.family.name: refusal for refusal in _ALL}
