"""Every name of vLLM that the plugin builds on, with the shape that it has to have, and the versions where it was seen.

vLLM promises none of these. `check_internals` runs before a served directory is loaded; where something is missing or
looks otherwise it says so, and nothing is served.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import Any

from dop_compile.errors import UnsupportedUsageError

__all__ = ["INTERNALS", "SEEN", "Internal", "check_internals"]

SEEN = ("0.32",)
"""Versions (major.minor) of vLLM in which all that is named here was found, and with which the tests have passed."""


@dataclass(frozen=True)
class Internal:
    """One name.

    Args:
        module, name: where it is.
        has: parameters of a function, or fields of a dataclass, that are used.
        exactly: there must be no others: an unknown one would be left as it is, and could be wrong.
        why: what it is used for.
    """

    module: str
    name: str
    has: tuple[str, ...] = ()
    exactly: bool = False
    why: str = ""

    def problem(self) -> str | None:
        """What is wrong with it here, None if nothing is."""
        try:
            found: Any = importlib.import_module(self.module)
            for part in self.name.split("."):
                found = inspect.getattr_static(found, part) if inspect.isclass(found) else getattr(found, part)
        except (ImportError, AttributeError):
            return f"{self.module}.{self.name} is not there ({self.why})"
        if not self.has:
            return None
        names = _names(found)
        missing = sorted(set(self.has) - names)
        others = sorted(names - set(self.has)) if self.exactly else []
        if missing or others:
            what = [f"has no {', '.join(missing)}"] if missing else []
            what += [f"has the new {', '.join(others)}"] if others else []
            return f"{self.module}.{self.name} {' and '.join(what)} ({self.why})"
        return None


def _names(found: Any) -> set[str]:
    if is_dataclass(found):
        return {field.name for field in fields(found)}
    if isinstance(found, staticmethod | classmethod):
        found = found.__func__
    if isinstance(found, cached_property):
        return {"cached_property"}
    return set(inspect.signature(found).parameters) - {"self", "cls"}


BACKEND = "vllm.v1.attention.backend"
ATTENTION = "vllm.model_executor.layers.attention.attention"
PROCESSING = "vllm.multimodal.processing.processor"
INTERFACES = "vllm.model_executor.models.interfaces"
MODELS = "vllm.model_executor.models"
LAYER = ("positions", "hidden_states", "residual")

INTERNALS = (
    Internal(
        BACKEND,
        "CommonAttentionMetadata",
        (
            *("query_start_loc", "query_start_loc_cpu", "seq_lens", "num_reqs", "num_actual_tokens", "max_query_len"),
            *("max_seq_len", "block_table_tensor", "slot_mapping", "causal", "logits_indices_padded"),
            *("num_logits_indices", "max_logits_per_req", "encoder_seq_lens", "encoder_seq_lens_cpu"),
            *("dcp_local_seq_lens", "dcp_local_seq_lens_cpu_upper_bound", "positions", "is_prefilling"),
            *("seq_lens_cpu_upper_bound", "req_idx", "mm_req_doc_ranges", "rswa_prefix_lens"),
            *("replayssm_decode_base_cpu", "_num_computed_tokens_cache", "_token_to_req_indices_cache"),
        ),
        exactly=True,
        why="a step as attention backends are told of it, and where its pictures are",
    ),
    Internal(
        BACKEND,
        "subclass_attention_backend",
        ("name_prefix", "attention_backend_cls", "builder_cls"),
        why="a layer's own backend with another builder",
    ),
    Internal(
        BACKEND,
        "AttentionMetadataBuilder.__init__",
        ("kv_cache_spec", "layer_names", "vllm_config", "device"),
        why="builders are made for narrowed layers",
    ),
    Internal(
        BACKEND,
        "AttentionMetadataBuilder.build",
        ("common_prefix_len", "common_attn_metadata", "fast_build"),
        why="metadata of narrowed layers",
    ),
    Internal(
        BACKEND,
        "AttentionMetadataBuilder.get_cudagraph_support",
        ("vllm_config", "kv_cache_spec"),
        why="narrowed layers are in no whole CUDA graph",
    ),
    Internal(BACKEND, "AttentionCGSupport.NEVER", why="narrowed layers are in no whole CUDA graph"),
    Internal(ATTENTION, "unified_kv_cache_update", ("key", "value", "layer_name"), why="keys of frozen tokens"),
    Internal(ATTENTION, "Attention.forward", ("query", "key", "value"), why="keys that are not stored"),
    Internal("vllm.forward_context", "ForwardContext", ("attn_metadata", "slot_mapping"), why="where keys go"),
    Internal(
        "vllm.config", "ModelConfig.is_mm_prefix_lm", ("cached_property",), why="the runner says where pictures are"
    ),
    Internal("vllm.config", "VllmConfig.use_v2_model_runner", why="V1 is what was run"),
    Internal("vllm.config", "ModelConfig.is_prefix_caching_supported", why="off unless asked for, with absent tokens"),
    Internal(f"{MODELS}.config", "MODELS_CONFIG_MAP", why="checks before anything is started"),
    Internal(PROCESSING, "BaseMultiModalProcessor._get_mm_hashes", ("inputs",), why="shares are part of hashes"),
    Internal(
        PROCESSING,
        "BaseMultiModalProcessor._cached_apply_hf_processor",
        ("inputs", "timing_ctx"),
        why="a prompt's pictures share its visual tokens",
    ),
    Internal(
        PROCESSING,
        "BaseMultiModalProcessor._get_cache_missing_items",
        ("cache", "mm_data_items", "mm_hashes"),
        why="which pictures are processed",
    ),
    Internal(
        PROCESSING,
        "BaseMultiModalProcessor._apply_hf_processor_main",
        ("mm_items", "hf_kwargs"),
        why="shares travel with pictures",
    ),
    Internal(
        PROCESSING,
        "BaseMultiModalProcessor._get_mm_fields_config",
        ("hf_inputs", "hf_processor_mm_kwargs"),
        why="shares travel with pictures",
    ),
    Internal(PROCESSING, "PromptReplacement", ("modality", "target", "replacement"), why="shorter placeholders"),
    Internal(PROCESSING, "PromptUpdateDetails", ("full", "is_embed"), why="shorter placeholders"),
    Internal("vllm.multimodal.inputs", "PlaceholderRange", ("offset", "length", "is_embed"), why="original positions"),
    Internal(
        INTERFACES,
        "SupportsMultiModal.embed_input_ids",
        ("input_ids", "multimodal_embeddings", "is_multimodal"),
        why="positions of tokens that are chosen by what the picture shows",
    ),
    Internal(
        INTERFACES,
        "SupportsMRoPE.get_mrope_input_positions",
        ("input_tokens", "mm_features"),
        why="original positions",
    ),
    Internal(f"{MODELS}.llama", "LlamaDecoderLayer.forward", LAYER, why="layers on fewer rows"),
    Internal(f"{MODELS}.qwen2", "Qwen2DecoderLayer.forward", LAYER, why="layers on fewer rows"),
    Internal(f"{MODELS}.qwen3", "Qwen3DecoderLayer.forward", LAYER, why="layers on fewer rows"),
)


def check_internals() -> None:
    """Raises UnsupportedUsageError where this vLLM is not one that the plugin was made for, naming all that differs."""
    import vllm

    release = ".".join(vllm.__version__.split(".")[:2])
    wrong = [problem for internal in INTERNALS if (problem := internal.problem()) is not None]
    if release not in SEEN:
        wrong.insert(0, f"vLLM {vllm.__version__} is not one that this release of dop_compile was tested with")
    if wrong:
        raise UnsupportedUsageError(f"{'; '.join(wrong)}. Install vLLM {' or '.join(SEEN)}, or a newer dop_compile")
