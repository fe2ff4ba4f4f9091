"""A layer's own attention backend with another metadata builder: it sees each step as its layer does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from vllm.v1.attention.backend import AttentionCGSupport, subclass_attention_backend

from dop_compile.plugins.vllm.narrowing import narrow
from dop_compile.plugins.vllm.roles import Attention

__all__ = ["PLAN", "narrowed_backend", "without_prefix_flag"]

PLAN = "dop_plan"
"""The attribute of a backend's metadata that holds a `Plan` or None."""


@contextmanager
def without_prefix_flag(model_config: Any) -> Iterator[None]:
    """While the block runs the model is none whose pictures see themselves both ways.

    The flag `is_mm_prefix_lm` has vLLM's runner say where pictures are, which is all that is wanted of it; attention
    stays causal, and layers shall have the backends and kernels that they have without us.
    """
    vars(model_config)["is_mm_prefix_lm"] = False  # where its cached property stores it
    try:
        yield
    finally:
        vars(model_config)["is_mm_prefix_lm"] = True


@cache
def narrowed_backend(backend: Any, attention: Attention) -> Any:
    """`backend` for layers in which visual tokens are `attention`."""

    class Builder(backend.get_builder_cls()):  # type: ignore[misc]
        # Blocks alone cannot be exchanged, since slots and lengths are narrowed too
        supports_update_block_table = False

        def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
            with without_prefix_flag(vllm_config.model_config):
                super().__init__(kv_cache_spec, layer_names, vllm_config, device)

        @classmethod
        def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
            # A whole graph would read tensors that are new in each step: graphs between attention calls are used
            return AttentionCGSupport.NEVER

        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
            given, plan = common_attn_metadata, None
            if attention != "full":
                given, plan = narrow(attention, given, self.kv_cache_spec.block_size)
            metadata = super().build(
                0 if plan is not None else common_prefix_len, given.replace(mm_req_doc_ranges=None), fast_build
            )
            setattr(metadata, PLAN, plan)
            return metadata

    return subclass_attention_backend(f"Dop{attention.title()}", backend, Builder)
