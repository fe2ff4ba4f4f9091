"""Text-only models: their visual tokens are what the caller's `token_groups` say."""

from __future__ import annotations

import functools
from typing import Any

import transformers as hf

from tests.conformance.configs import tiny
from tests.families import HEADS, Family

__all__ = ["TEXT_ONLY"]

_ALTERNATING: dict[str, Any] = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_MULTI_HEAD = {"num_key_value_heads": HEADS}


def _text(name: str, model: str, flags: dict[str, Any] | None = None, **overrides: Any) -> Family:
    model_class = getattr(hf, model)
    return Family(name, model_class, functools.partial(tiny, model_class.config_class, **overrides), **(flags or {}))


_SLIDES = {"has_sliding_layers": True}
_ABSOLUTE = {"has_absolute_positions": True}
_PARALLEL = {"is_parallel": True}

_ALL = (
    _text("mistral", "MistralForCausalLM", _SLIDES, sliding_window=8),
    _text("ministral", "MinistralForCausalLM", _SLIDES, **_ALTERNATING),
    _text("ministral3", "Ministral3ForCausalLM"),
    _text("qwen3", "Qwen3ForCausalLM"),
    _text("phi", "PhiForCausalLM", _PARALLEL, **_MULTI_HEAD),
    _text("phi3", "Phi3ForCausalLM"),
    _text("gemma", "GemmaForCausalLM", tie_word_embeddings=True),
    _text("gemma2", "Gemma2ForCausalLM", _SLIDES, tie_word_embeddings=True, **_ALTERNATING),
    _text("gemma3_text", "Gemma3ForCausalLM", _SLIDES, tie_word_embeddings=True, **_ALTERNATING),
    _text("olmo", "OlmoForCausalLM"),
    _text("olmo2", "Olmo2ForCausalLM"),
    _text("olmo3", "Olmo3ForCausalLM", _SLIDES, **_ALTERNATING),
    _text("granite", "GraniteForCausalLM", residual_multiplier=0.5, embedding_multiplier=2.0),
    _text("cohere", "CohereForCausalLM", _PARALLEL, tie_word_embeddings=True, logit_scale=0.5),
    _text("cohere2", "Cohere2ForCausalLM", _PARALLEL | _SLIDES, tie_word_embeddings=True, logit_scale=0.5, **_ALTERNATING),
    _text("starcoder2", "Starcoder2ForCausalLM"),
    _text("gpt_neox", "GPTNeoXForCausalLM", _PARALLEL),
    _text("gpt_neox_serial", "GPTNeoXForCausalLM", use_parallel_residual=False),
    _text("stablelm", "StableLmForCausalLM"),
    _text("glm", "GlmForCausalLM"),
    _text("glm4", "Glm4ForCausalLM"),
    _text("smollm3", "SmolLM3ForCausalLM"),
    _text("seed_oss", "SeedOssForCausalLM"),
    _text("helium", "HeliumForCausalLM"),
    _text("arcee", "ArceeForCausalLM"),
    _text("apertus", "ApertusForCausalLM"),
    _text("ernie4_5", "Ernie4_5ForCausalLM"),
    _text("exaone4", "Exaone4ForCausalLM", _SLIDES, **_ALTERNATING),
    _text("hunyuan_dense", "HunYuanDenseV1ForCausalLM", _ABSOLUTE),
    _text("nemotron", "NemotronForCausalLM"),
    _text("persimmon", "PersimmonForCausalLM"),
    _text("diffllama", "DiffLlamaForCausalLM"),
    _text("vaultgemma", "VaultGemmaForCausalLM", _SLIDES, tie_word_embeddings=True, **_ALTERNATING),
    _text("mixtral", "MixtralForCausalLM"),
    _text("qwen2_moe", "Qwen2MoeForCausalLM"),
    _text("qwen3_moe", "Qwen3MoeForCausalLM"),
    _text("gpt_oss", "GptOssForCausalLM", _SLIDES, **_ALTERNATING),
    _text("olmoe", "OlmoeForCausalLM"),
    _text("phimoe", "PhimoeForCausalLM"),
    _text("granitemoe", "GraniteMoeForCausalLM"),
    _text("granitemoe_shared", "GraniteMoeSharedForCausalLM", shared_intermediate_size=32),
    _text("deepseek_v2", "DeepseekV2ForCausalLM", **_MULTI_HEAD),
    _text("deepseek_v3", "DeepseekV3ForCausalLM", **_MULTI_HEAD),
    _text("glm4_moe", "Glm4MoeForCausalLM"),
    _text("dots1", "Dots1ForCausalLM"),
    _text("minimax_m2", "MiniMaxM2ForCausalLM"),
    _text("ernie4_5_moe", "Ernie4_5_MoeForCausalLM"),
    _text("llama4_text", "Llama4ForCausalLM"),
    _text("opt", "OPTForCausalLM", _ABSOLUTE, ffn_dim=96, word_embed_proj_dim=64, tie_word_embeddings=True),
    _text("gpt2", "GPT2LMHeadModel", _ABSOLUTE, tie_word_embeddings=True),
    _text("gptj", "GPTJForCausalLM", rotary_dim=8),
    _text("gpt_bigcode", "GPTBigCodeForCausalLM", _ABSOLUTE, tie_word_embeddings=True),
    _text("falcon", "FalconForCausalLM", tie_word_embeddings=True),
    _text("bloom", "BloomForCausalLM", tie_word_embeddings=True),
)
TEXT_ONLY: dict[str, Family] = {family.name: family for family in _ALL}
