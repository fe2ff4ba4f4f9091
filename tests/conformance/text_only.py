"""Text-only models: their visual tokens are what the caller's `token_groups` say."""

from __future__ import annotations

import functools
from typing import Any

import transformers as hf

from tests.conformance.configs import tiny
from tests.families import HEADS, VOCAB, Family

__all__ = ["SHARED", "SHARES", "TEXT_ONLY", "text"]

_ALTERNATING: dict[str, Any] = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_MULTI_HEAD = {"num_key_value_heads": HEADS}


def text(name: str, model: str, flags: dict[str, Any] | None = None, **overrides: Any) -> Family:
    model_class = getattr(hf, model)
    return Family(name, model_class, functools.partial(tiny, model_class.config_class, **overrides), **(flags or {}))


_SLIDES = {"has_sliding_layers": True}
SHARES: dict[str, Any] = {"num_layers": 6, "replays_from": 1}
SHARED: dict[str, Any] = {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 3,
    "global_head_dim": 32,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
"""Layers 3 and 5 read the keys and values of layer 1, layer 4 those of layer 2, a sliding one."""
_ABSOLUTE = {"has_absolute_positions": True}
_PARALLEL = {"is_parallel": True}

_ALL = (
    text("mistral", "MistralForCausalLM", _SLIDES, sliding_window=8),
    text("ministral", "MinistralForCausalLM", _SLIDES, **_ALTERNATING),
    text("ministral3", "Ministral3ForCausalLM"),
    text("qwen3", "Qwen3ForCausalLM"),
    text("phi", "PhiForCausalLM", _PARALLEL, **_MULTI_HEAD),
    text("phi3", "Phi3ForCausalLM"),
    text("gemma", "GemmaForCausalLM", tie_word_embeddings=True),
    text("gemma2", "Gemma2ForCausalLM", _SLIDES, tie_word_embeddings=True, **_ALTERNATING),
    text("gemma3_text", "Gemma3ForCausalLM", _SLIDES, tie_word_embeddings=True, **_ALTERNATING),
    text("olmo", "OlmoForCausalLM"),
    text("olmo2", "Olmo2ForCausalLM"),
    text("olmo3", "Olmo3ForCausalLM", _SLIDES, **_ALTERNATING),
    text("granite", "GraniteForCausalLM", residual_multiplier=0.5, embedding_multiplier=2.0),
    text("cohere", "CohereForCausalLM", _PARALLEL, tie_word_embeddings=True, logit_scale=0.5),
    text(
        "cohere2", "Cohere2ForCausalLM", _PARALLEL | _SLIDES, tie_word_embeddings=True, logit_scale=0.5, **_ALTERNATING
    ),
    text("starcoder2", "Starcoder2ForCausalLM"),
    text("gpt_neox", "GPTNeoXForCausalLM", _PARALLEL),
    text("gpt_neox_serial", "GPTNeoXForCausalLM", use_parallel_residual=False),
    text("stablelm", "StableLmForCausalLM"),
    text("glm", "GlmForCausalLM"),
    text("glm4", "Glm4ForCausalLM"),
    text("smollm3", "SmolLM3ForCausalLM"),
    text("seed_oss", "SeedOssForCausalLM"),
    text("helium", "HeliumForCausalLM"),
    text("arcee", "ArceeForCausalLM"),
    text("apertus", "ApertusForCausalLM"),
    text("ernie4_5", "Ernie4_5ForCausalLM"),
    text("exaone4", "Exaone4ForCausalLM", _SLIDES, **_ALTERNATING),
    text("hunyuan_dense", "HunYuanDenseV1ForCausalLM", _ABSOLUTE),
    text("nemotron", "NemotronForCausalLM"),
    text("persimmon", "PersimmonForCausalLM"),
    text("vaultgemma", "VaultGemmaForCausalLM", _SLIDES, tie_word_embeddings=True, **_ALTERNATING),
    text("mixtral", "MixtralForCausalLM"),
    text("qwen2_moe", "Qwen2MoeForCausalLM"),
    text("qwen3_moe", "Qwen3MoeForCausalLM"),
    text("gpt_oss", "GptOssForCausalLM", _SLIDES, **_ALTERNATING),
    text("olmoe", "OlmoeForCausalLM"),
    text("phimoe", "PhimoeForCausalLM"),
    text("granitemoe", "GraniteMoeForCausalLM"),
    text("granitemoe_shared", "GraniteMoeSharedForCausalLM", shared_intermediate_size=32),
    text("deepseek_v2", "DeepseekV2ForCausalLM", **_MULTI_HEAD),
    text("deepseek_v3", "DeepseekV3ForCausalLM", **_MULTI_HEAD),
    text("glm4_moe", "Glm4MoeForCausalLM"),
    text("dots1", "Dots1ForCausalLM"),
    text("minimax_m2", "MiniMaxM2ForCausalLM"),
    text("ernie4_5_moe", "Ernie4_5_MoeForCausalLM"),
    text("llama4_text", "Llama4ForCausalLM", attention_chunk_size=8),
    text(
        "gemma4_text",
        "Gemma4ForCausalLM",
        _SLIDES,
        tie_word_embeddings=True,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=VOCAB,
        **_ALTERNATING,
    ),
    text(
        "gemma4_shared_text",
        "Gemma4ForCausalLM",
        _SLIDES | SHARES | {"seed": 2},
        tie_word_embeddings=True,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=VOCAB,
        use_double_wide_mlp=True,
        **SHARED,
    ),
    text("nanochat", "NanoChatForCausalLM"),
    text("bitnet", "BitNetForCausalLM"),
    text("flex_olmo", "FlexOlmoForCausalLM"),
    text("cwm", "CwmForCausalLM"),
    text("solar_open", "SolarOpenForCausalLM"),
    text("mistral4", "Mistral4ForCausalLM", **_MULTI_HEAD),
    text("minicpm3", "MiniCPM3ForCausalLM", **_MULTI_HEAD),
    text("hunyuan_moe", "HunYuanMoEV1ForCausalLM", _ABSOLUTE),
    text("cohere2_moe", "Cohere2MoeForCausalLM", _PARALLEL),
    text("exaone_moe", "ExaoneMoeForCausalLM"),
    text("jais2", "Jais2ForCausalLM"),
    text("hyperclovax", "HyperCLOVAXForCausalLM"),
    text("afmoe", "AfmoeForCausalLM"),
    text("laguna", "LagunaForCausalLM"),
    text("mellum", "MellumForCausalLM"),
    text("aria_text", "AriaTextForCausalLM"),
    text("emu3_text", "Emu3ForCausalLM"),
    text("flint", "FlintForCausalLM"),
    text(
        "gemma4_unified_text",
        "Gemma4UnifiedForCausalLM",
        _SLIDES | {"seed": 1},
        tie_word_embeddings=True,
        **_ALTERNATING,
    ),
    text(
        "gemma4_unified_shared_text",
        "Gemma4UnifiedForCausalLM",
        _SLIDES | SHARES,
        tie_word_embeddings=True,
        **SHARED,
    ),
    text("granite_swa", "GraniteSWAForCausalLM", _SLIDES, **_ALTERNATING),
    text("granitemoe_swa", "GraniteMoeSWAForCausalLM", _SLIDES, **_ALTERNATING),
    text("hy_v3", "HYV3ForCausalLM"),
    text("mimo_v2_flash", "MiMoV2FlashForCausalLM"),
    text("minimax_m3_text", "MiniMaxM3VLForCausalLM", rotary_dim=8),
    text("kolibri1", "Kolibri1ForCausalLM"),
    text("glm4_moe_lite", "Glm4MoeLiteForCausalLM", **_MULTI_HEAD),
    text("youtu", "YoutuForCausalLM", **_MULTI_HEAD),
    text("axk1", "AXK1ForCausalLM", **_MULTI_HEAD),
    text("biogpt", "BioGptForCausalLM", _ABSOLUTE),
    text("opt", "OPTForCausalLM", ffn_dim=96, word_embed_proj_dim=64, tie_word_embeddings=True),
    text("gpt2", "GPT2LMHeadModel", _ABSOLUTE, tie_word_embeddings=True),
    text("gpt_bigcode", "GPTBigCodeForCausalLM", _ABSOLUTE, tie_word_embeddings=True),
)
TEXT_ONLY: dict[str, Family] = {family.name: family for family in _ALL}
