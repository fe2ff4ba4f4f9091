"""Names of transformers' models that nothing tells but their sources. Imports nothing.

Each is here for a reason that its docstring gives; `tests/hf/test_names.py` fails where a release has none of them.
"""

from __future__ import annotations

# Tokens.

PLACEHOLDER_IDS = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
"""Where configurations name placeholder ids, for models that cannot say themselves which positions are visual."""
TYPE_IDS = ("token_type_ids", "mm_token_type_ids")
"""Arguments of outer models that mark placeholders of images with 1."""
NEWLINE_EMBEDDINGS = ("image_newline",)
"""Embeddings that a model inserts inside image placeholders: visual, never dropped, not counted."""

# Vision towers.

FEATURE_METHODS = ("get_image_features", "get_video_features")
"""What outer models encode pictures by."""
PROJECTORS = ("multi_modal_projector", "modality_projection", "merger", "mm_projector")
"""Modules between tower and decoder."""
ATTENTIONS = ("self_attn", "attention", "attn")
"""Attention modules in the layers of towers."""
CLASS_TOKENS = ("class_embedding", "cls_token", "class_token")
"""Parameters of towers whose first token is no patch."""
FIXED_TOWERS = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Towers of one resolution, and how many tokens they have besides those of the patches."""
REARRANGED = ("image_grid_pinpoints", "downsample_factor", "downsample_ratio", "spatial_merge_size", "scale_factor")
"""What configurations have whose tokens are not the tower's patches, or whose pictures are cut into tiles."""
TILED = (
    *("Aria", "AyaVision", "Cohere2Vision", "GotOcr2", "InternVL", "Lfm2Vl", "Lfm3Vl", "Llama4", "MiniCPM", "Ovis2"),
    *("PerceptionLM", "QianfanOCR"),
    *("GraniteDocling", "Idefics", "ModernVBert", "SmolVLM", "UltraVBert"),
)
"""Models, by how their classes' names begin, whose feature methods return one entry per tile, or per row of the batch;
nothing they are given says how many tiles an image has."""

# Decoders.

CONVERSATION_ATTRIBUTES = ("rope_deltas",)
"""Attributes that outer models keep between calls on the module; here they live in the cache."""
PACKED_FEATURES = {"deepstack_visual_embeds": "visual_pos_masks", "deepstack_features": "vision_mask"}
"""Arguments for features of visual tokens without a batch dimension, and for the mask of the tokens they belong to."""
PER_LAYER = "per_layer_inputs"
"""Embeddings of ids that decoders with `get_per_layer_inputs` give to each layer."""
UNUSED_ARGUMENTS = ("num_items_in_batch", "cache_position", "mm_token_type_ids", "logits_to_keep")
"""What outer models pass on to decoders that take any keyword but do nothing with these."""
LEAVES_ROWS_OUT = ("first_kv_shared_layer_idx",)
"""Attributes of decoders: the layer from which on they work on the rows alone whose logits are asked for."""
REFUSED_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits", "return_shared_kv_states")
"""What a pruned decoder does not have, or not of all tokens."""
BLOCKS = "block_sequence_ids"
"""The argument of mask builders that they pad."""
NOT_OF_EAGER = ("dropout", "is_causal", "sliding_window")
"""Settings of kernels that eager attention, which is given a mask, does not take or is told otherwise."""
CHANNEL_MIXERS = ("norm", "ln_", "mlp", "feed_forward", "moe", "dropout", "ffn", "activation", "experts")
"""Parts of the names of modules that look at one token at a time: a layer of these alone attends to nothing."""
STATE_UPDATES = frozenset({"update_conv_state", "update_recurrent_state"})
"""Methods of caches by which a forward keeps a convolution's window or a recurrent state."""
MIXED_BY = ("past_key_values", "cache_params", "attention_mask", "position_ids", "position_embeddings")
"""Arguments of modules that may look at other tokens than their own."""
UNPRUNABLE_SETTINGS = {
    "cross_attention_layers": "layers {} attend to image features outside of the token sequence, which hold no visual "
    "tokens that could be pruned",
    "altup_num_inputs": "its layers work on {} residual streams at once (AltUp), and update only one of them",
    "hc_mult": "its layers mix {} residual streams at once (hyper-connections)",
    "hc_count": "its layers mix {} residual streams at once (hyper-connections)",
}
"""Settings of configurations that a decoder cannot be pruned with, and why."""
UNPRUNABLE_LAYERS = {
    "reference_sliding_attention": "it keeps the whole prompt and a window of what is generated, in a cache of its own",
}
"""Types of layers, of those that a configuration names, whose keys cannot be chosen."""

# Sizes of decoders.

PLAIN_MLP = frozenset(
    {"opt", "gpt_neox", "phi", "starcoder2", "persimmon", "nemotron", "nemotron_h", "arcee", "apertus"}
)
GATED_PREFIXES = ("gemma", "lfm")
"""Model types whose MLP has two matrices, and beginnings of those that have three. Their activation does not tell:
Starcoder2 and Gemma share theirs, and only Gemma's MLP is gated; configurations of LFM have none."""
ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention"})
"""Types of layers that eq. 11 describes."""
MIXER_LAYERS = frozenset({"linear_attention", "mamba", "conv", "hybrid", "hybrid_sliding", "moe", "mlp"})
"""Types of layers that have other token mixers, beside an attention or without, or none at all."""
EXPERTS_SWITCH = "enable_moe_block"
"""Whether there are experts, where their number does not tell."""
PER_LAYER_SIZE = "hidden_size_per_layer_input"
"""The width of a layer's MLP that reads a second embedding of each token."""
UNLIKE_LAYERS = ("is_heterogeneous", "num_kv_shared_layers", PER_LAYER_SIZE)
"""What configurations have whose layers are of several sizes, or of parts that no setting gives the size of."""
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""How many experts there are, which is how wide the matrix of their router is."""

# Generation and saving.

CONTINUOUS_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
"""Ways into transformers' own server loop."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_FILES = ("adapter_config.json", ADAPTER_WEIGHTS, "adapter_model.bin")
"""What peft saves an adapter as."""
PASSING_ON = ("accelerate.utils.operations", "torch.amp.autocast_mode", "torch.utils._contextlib")
"""Modules whose wrappers call what they wrap with the arguments they are given: conversion, autocast, no_grad."""
PREPARATION = ("_original_forward", "_is_accelerate_prepared")
"""What accelerate notes on the model that it wraps."""
