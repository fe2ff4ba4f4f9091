"""Families that cannot be pruned exactly, and the property of each that prevents it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import transformers as hf
from transformers import models

from tests.conformance.configs import LINEAR, QWEN_TOWER, tiny, tiny_tower
from tests.conformance.documents import SAM
from tests.conformance.images import fitted, pixels
from tests.conformance.llava_like import vlm
from tests.conformance.text_only import text
from tests.families import HEADS, HIDDEN, VOCAB, Family

__all__ = ["REFUSED", "Refusal"]


@dataclass(frozen=True)
class Refusal:
    """A family, what the error says (a pattern), and the reason in the words of docs/models.md."""

    family: Family
    message: str
    reason: str
    with_groups: bool = True  # refused even if the caller says which tokens are visual


_RECURRENT = "a recurrence that keeps its state elsewhere than in the cache, in some layers"
_MIXED = r"layer \d+ of .* mixes tokens by .*{}.*needs every token"
_OWN = "attention that does not go through the attention interface, so that its parts cannot be told apart"
_NOT_REGISTERED = r"layer 0 of .* mixes tokens by .*{}.*attention interface"
_IMAGE = fitted(pixels(24))
_ALTERNATING: dict[str, Any] = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
          "patch_size": 4}  # fmt: skip
_RANKED = r"layer \d+ of .* holds self_attn.indexer .* ranks all tokens"
_INDEXER: dict[str, Any] = {"index_topk": 4, "index_head_dim": 16, "index_n_heads": 2, "num_key_value_heads": HEADS}
_SPARSE = "keys of each query chosen by a ranking of all tokens in some layers"
_STREAMS = "several residual streams at once (hyper-connections)"
_SHORT_CONVOLUTION = "a convolution over neighbouring keys and values inside the attention"
_INKLING: dict[str, Any] = {"swa_num_attention_heads": HEADS, "swa_num_key_value_heads": 2, "swa_head_dim": 16,
                            "sliding_window_size": 8, "d_rel": 4, "rel_extent": 16}  # fmt: skip


def _text_config(module: str, name: str, **settings: Any) -> Any:
    """The tiny configuration of a class that transformers does not export."""
    return functools.partial(tiny, getattr(getattr(models, module), name), **settings)


_ALL = (
    Refusal(
        vlm("kosmos2", "Kosmos2ForConditionalGeneration",
            functools.partial(tiny, models.kosmos2.configuration_kosmos2.Kosmos2TextConfig, ffn_dim=96,
                              tie_word_embeddings=True),
            functools.partial(tiny_tower, models.kosmos2.configuration_kosmos2.Kosmos2VisionConfig, patch=8),
            _IMAGE, latent_query_num=4),
        "builds its attention mask itself",
        "an attention mask that the decoder builds itself",
    ),
    Refusal(
        vlm("minimax_m3_vl_sparse", "MiniMaxM3SparseForConditionalGeneration",
            _text_config("minimax_m3_vl", "MiniMaxM3VLTextConfig", dense_intermediate_size=96, rotary_dim=8,
                         shared_intermediate_size=32, layer_types=["full_attention", "minimax_m3_sparse"] * 2),
            lambda: _TOWER | {"image_size": 24}, _IMAGE, projector_hidden_size=48),
        _RANKED,
        _SPARSE,
    ),
    Refusal(
        vlm("dots3_note", "Dots3NoteForConditionalGeneration",
            _text_config("dots3_note", "Dots3NoteTextConfig", shared_experts_intermediate_size=32, **_INDEXER),
            lambda: _TOWER | {"moe_intermediate_size": 16, "num_local_experts": 2, "num_experts_per_tok": 1,
                              "adapter_in_dim": 32, "adapter_out_dim": HIDDEN, "per_layer_config": None},
            _IMAGE,
            audio_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                          "feature_size": 8, "downsample_hidden_size": 8, "adapter_input_size": 16,
                          "adapter_out_dim": HIDDEN}),
        _RANKED,
        _SPARSE,
    ),
    Refusal(
        vlm("mistral_large4", "MistralLarge4ForConditionalGeneration",
            _text_config("mistral_large4", "MistralLarge4TextConfig", **_INDEXER),
            functools.partial(tiny_tower, hf.PixtralVisionConfig, side=32, patch=8, head_dim=16), _IMAGE),
        _RANKED,
        _SPARSE,
    ),
    Refusal(
        vlm("glm5_next", "Glm5NextForConditionalGeneration",
            _text_config("glm5_next", "Glm5NextTextConfig", qk_rope_head_dim=0, linear_head_dim=16, linear_num_heads=2,
                         index_kpool=2, hc_mult=2, **_INDEXER),
            lambda: QWEN_TOWER | {"image_size": 24}, _IMAGE),
        "hc_mult=2.*residual streams",
        _STREAMS,
    ),
    Refusal(
        vlm("qwen4_exp", "Qwen4ExpForConditionalGeneration",
            _text_config("qwen4_exp", "Qwen4ExpTextConfig", hc_count=2, hc_lowrank=8, ngram_vocab_size_base=50,
                         make_ngram_vocab_size_divisible_by=4, split_ngram_parts=2, heads_per_ngram=2,
                         indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=8,
                         indexer_compress_ratio=4, **LINEAR),
            lambda: QWEN_TOWER, _IMAGE),
        "hc_count=2.*residual streams",
        _STREAMS,
    ),
    Refusal(
        vlm("inkling", "InklingForConditionalGeneration", _text_config("inkling", "InklingTextConfig", **_INKLING),
            lambda: {"text_hidden_size": HIDDEN, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2,
                     "num_attention_heads": 2},
            _IMAGE, audio_config={"n_mel_bins": 8, "mel_vocab_size": 8, "text_hidden_size": HIDDEN}),
        "convolves neighbouring tokens",
        _SHORT_CONVOLUTION,
    ),
    Refusal(
        vlm("inkling2", "Inkling2ForConditionalGeneration",
            _text_config("inkling2", "Inkling2TextConfig", unpadded_vocab_size=VOCAB, n_layers_per_attn_res_block=2,
                         **_INKLING),
            lambda: _TOWER | {"text_hidden_size": HIDDEN, "projection_hidden_dim": 32, "posemb_grid_size": 6}, _IMAGE),
        "convolves neighbouring tokens",
        _SHORT_CONVOLUTION,
    ),
    Refusal(
        vlm("muse_spark", "MuseSparkForConditionalGeneration",
            _text_config("muse_spark", "MuseSparkTextConfig", moe_hidden_size=32,
                         mlp_layer_types=["dense", "sparse"] * 2, **_ALTERNATING),
            lambda: _TOWER | {"pos_emb_height": 4, "pos_emb_width": 4, "max_position_embeddings": 16}, _IMAGE,
            out_hidden_size=128, projector_hidden_size=48,
            audio_config={"patch_sizes": [4, 2], "hidden_sizes": [8, 16], "depths": [1, 1], "num_hidden_layers": 2,
                          "out_hidden_size": HIDDEN}),
        "no addition to a residual stream",
        "gates that scale the residual stream in every layer: no token passes one unchanged",
    ),
    Refusal(
        vlm("unlimited_ocr", "UnlimitedOcrForConditionalGeneration",
            _text_config("unlimited_ocr", "UnlimitedOcrTextConfig", mlp_layer_types=["dense", *["sparse"] * 3],
                         sliding_window=8),
            lambda: {"sam_config": SAM, "encoder_config": _TOWER | {"image_size": 64, "patch_size": 16}}, _IMAGE),
        "is of type 'reference_sliding_attention'",
        "a window over generated tokens alone, in a cache of its own",
    ),
    Refusal(
        vlm("mllama_vl", "MllamaForConditionalGeneration",
            _text_config("mllama", "MllamaTextConfig", cross_attention_layers=[1, 3]),
            lambda: {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1,
                     "attention_heads": 2, "image_size": 24, "patch_size": 8, "vision_output_dim": 64,
                     "intermediate_layers_indices": [0], "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]},
            _IMAGE),
        "image features outside of the token sequence",
        "cross-attention to image features: no visual tokens in the sequence",
    ),
    Refusal(
        vlm("kosmos2_5", "Kosmos2_5ForConditionalGeneration",
            _text_config("kosmos2_5", "Kosmos2_5TextConfig", ffn_dim=96, tie_word_embeddings=True),
            lambda: _TOWER | {"head_dim": 16, "max_num_patches": 36, "patch_embed_hidden_size": 48}, _IMAGE,
            latent_query_num=4),
        "does not say which tokens are visual",
        "images whose tokens only the caller knows (`image_embeds_position_mask`)",
        with_groups=False,
    ),
    Refusal(
        text("git", "GitForCausalLM",
             vision_config=_TOWER | {"image_size": 24, "patch_size": 8}),
        _NOT_REGISTERED.format("GitAttention"),
        _OWN,
    ),
    *(
        Refusal(text(name, model), "hc_mult=4.*residual streams", _STREAMS)
        for name, model in (("deepseek_v4", "DeepseekV4ForCausalLM"), ("hy_v4", "HYV4ForCausalLM"))
    ),
    *(
        Refusal(text(name, model, num_key_value_heads=HEADS), _RANKED, _SPARSE)
        for name, model in (
            ("deepseek_v32", "DeepseekV32ForCausalLM"),
            ("glm_moe_dsa", "GlmMoeDsaForCausalLM"),
            ("axk2", "AXK2ForCausalLM"),
        )
    ),
    Refusal(text("diffllama", "DiffLlamaForCausalLM"), "holds 2 attention kernels",
            "two attentions per layer, subtracted from each other"),
    *(
        Refusal(text(name, model, state_size=4), "residual stream is replaced by other means",
                "layers of state spaces alone, on a residual stream that each casts to float32")
        for name, model in (("mamba", "MambaForCausalLM"), ("falcon_mamba", "FalconMambaForCausalLM"))
    ),
    *(
        Refusal(text(name, model, **settings), _MIXED.format(mixer), _RECURRENT)
        for name, model, mixer, settings in (
            ("recurrent_gemma", "RecurrentGemmaForCausalLM", "RecurrentBlock", {}),
            ("minimax", "MiniMaxForCausalLM", "LightningAttention",
             {"layer_types": ["linear_attention", "full_attention"] * 2}),
        )
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
