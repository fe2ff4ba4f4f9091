"""Tiny configurations of any class: what a class calls its sizes is looked up, the rest is its default."""

from __future__ import annotations

import dataclasses
from typing import Any

import transformers as hf

from tests.families import BOS, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, PAD, VOCAB

__all__ = ["LINEAR", "QWEN_TOWER", "tiny", "tiny_tower"]

LINEAR: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
"""Every other layer a recurrence, as Qwen3.5 and its kin name their sizes."""
QWEN_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
               "out_hidden_size": HIDDEN, "num_position_embeddings": 36}  # fmt: skip
"""The tower of Qwen's newer models."""

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "query_pre_attn_scalar": HEAD_DIM,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}


def _accepted(config: type[hf.PreTrainedConfig], settings: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map)
    return {name: value for name, value in settings.items() if name in names}


def tiny(config: type[hf.PreTrainedConfig], **overrides: Any) -> Any:
    """A text configuration with the sizes of `tests.families`, as far as the class has them."""
    settings = _accepted(config, _SIZES | _EXPERTS | _LATENT)
    if "kv_lora_rank" in settings:
        settings.pop("head_dim", None)  # follows from the parts with and without rotary positions
    return config(**(settings | overrides))


def tiny_tower(config: type[hf.PreTrainedConfig], side: int = 24, patch: int = 4, **overrides: Any) -> Any:
    """A vision configuration: two layers of 32, images of `side` pixels."""
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": side,
        "patch_size": patch,
    }
    return config(**(_accepted(config, settings) | overrides))
