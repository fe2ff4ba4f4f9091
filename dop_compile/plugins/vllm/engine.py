"""What an engine may be set up as under a policy: asked before anything is started, and once more where layers are.

Refused, each with what to change: pipeline parallelism, LoRA, micro-batches, context parallelism, transfer of caches,
speculation by a model, CUDA graphs of the vision tower, prefix caching where keys are left out, model runner V2,
attention backends that were not read.
"""

from __future__ import annotations

import os
from typing import Any

from vllm.config import ModelConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from dop_compile.errors import UnsupportedUsageError
from dop_compile.plugins.vllm.families import family_of
from dop_compile.plugins.vllm.internals import check_internals
from dop_compile.plugins.vllm.policies import check_policy
from dop_compile.plugins.vllm.roles import Roles
from dop_compile.plugins.vllm.section import Section
from dop_compile.policy.policy import Policy

__all__ = ["EngineSettings", "check_backend", "check_engine"]

BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")
"""Their builders take sequences of any number and lengths, and they write keys apart from attention."""
SPECULATION = ("ngram",)


class EngineSettings(VerifyAndUpdateConfig):  # type: ignore[misc]
    """vLLM asks it while an engine is set up, in the process that was started."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        check_internals()
        # Runner V2 was never run under a policy: this engine has V1, unless someone asks for V2, which is an error
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
        section = Section.from_config(vars(model_config.hf_config))
        if not Roles.of(section.policy).stores_every_key and type(model_config) is ModelConfig:
            model_config.__class__ = ModelConfigWithoutPrefixCaching

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        check_internals()
        config = vllm_config.model_config.hf_config
        section = Section.from_config(vars(config))
        layers = config.get_text_config().num_hidden_layers
        check_policy(section.policy, family_of(config.to_dict()), layers)
        check_engine(vllm_config, section.policy)


class ModelConfigWithoutPrefixCaching(ModelConfig):  # type: ignore[misc]
    """Prefix caching is then off unless it is asked for, which is an error (`check_engine`)."""

    @property
    def is_prefix_caching_supported(self) -> bool:
        return False


def check_engine(vllm_config: Any, policy: Policy) -> None:
    """Raises UnsupportedUsageError for settings under which a policy cannot run; the message says what to change."""
    parallel, compilation = vllm_config.parallel_config, vllm_config.compilation_config
    speculation = vllm_config.speculative_config
    refused = (
        (
            vllm_config.cache_config.enable_prefix_caching and not Roles.of(policy).stores_every_key,
            "prefix caching: this policy prunes mha_key_value, and such layers hold keys without gaps, which another "
            "prompt cannot go on from; leave --enable-prefix-caching out, or serve a policy that keeps keys and values",
        ),
        (
            parallel.pipeline_parallel_size > 1,
            "pipeline parallelism: rows leave inside the decoder; use --tensor-parallel-size",
        ),
        (vllm_config.lora_config is not None, "LoRA: rows are counted per request there; merge the adapter"),
        (parallel.enable_dbo, "micro-batches: a step's rows are narrowed as a whole; leave --enable-dbo out"),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "context parallelism: keys would be divided by places that are not theirs; use --tensor-parallel-size",
        ),
        (
            vllm_config.kv_transfer_config is not None or vllm_config.ec_transfer_config is not None,
            "transfer of caches: another engine would read them otherwise; leave --kv-transfer-config out",
        ),
        (
            speculation is not None and speculation.method not in SPECULATION,
            f"speculation by {getattr(speculation, 'method', None)!r}: a draft model reads the hidden states of tokens "
            f"that have left; use {' or '.join(SPECULATION)}",
        ),
        (
            bool(getattr(compilation, "cudagraph_mm_encoder", False)) and policy.visual_tokens is not None,
            "CUDA graphs of the vision tower: pictures would not be reduced; leave cudagraph_mm_encoder out",
        ),
        (
            vllm_config.use_v2_model_runner,
            "vLLM's model runner V2, which has not been tried; leave VLLM_USE_V2_MODEL_RUNNER out, or set it to 0",
        ),
    )
    found = [why for is_so, why in refused if is_so]
    if found:
        raise UnsupportedUsageError("a policy cannot run with " + "; nor with ".join(found))


def check_backend(attention: Any) -> None:
    """Raises UnsupportedUsageError for a layer (vLLM's `Attention`) whose backend or window is not known."""
    backend = attention.attn_backend
    if backend.get_name() not in BACKENDS or backend.forward_includes_kv_cache_update:
        raise UnsupportedUsageError(
            f"attention backend {backend.get_name()}: policies run with {', '.join(BACKENDS)}; choose one with "
            "--attention-backend"
        )
    if attention.sliding_window is not None:
        raise UnsupportedUsageError(f"{attention.layer_name} has a sliding window; only full attention can be served")
