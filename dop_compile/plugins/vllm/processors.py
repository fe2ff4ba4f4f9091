"""vLLM's processors of multimodal prompts, with placeholders of as many tokens as the policy lets in.

vLLM caches processed pictures by a hash of what they show. A picture's share of a prompt is part of it (`shares`), and
travels with the picture to the model, as the field SHARE.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems
from vllm.multimodal.processing import PromptUpdateDetails

from dop_compile.errors import UnsupportedUsageError
from dop_compile.plugins.vllm.section import Section
from dop_compile.plugins.vllm.shares import Layout, Share, shares_of

__all__ = ["SHARE", "ImagesOnly", "Shortening"]

SHARE = "dop_share"


@dataclass
class _Call:
    """One prompt on its way through the processor. `pending`: shares of the pictures that are processed now."""

    shares: list[Share]
    pending: list[Share]


_call: ContextVar[_Call | None] = ContextVar("dop_compile_vllm_call", default=None)
# A processor serves several threads


class ImagesOnly:
    """Mixed in before a `BaseProcessingInfo`: videos have not been tried under a policy."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        limits: Mapping[str, int | None] = super().get_supported_mm_limits()  # type: ignore[misc]
        return {modality: limit if modality == "image" else 0 for modality, limit in limits.items()}


class Shortening:
    """Mixed in before a `BaseMultiModalProcessor`."""

    info: Any

    def layout(self, size: Any, hf_kwargs: Mapping[str, object]) -> Layout:
        """A picture of `size` (width, height) before reduction."""
        raise NotImplementedError

    @property
    def _visual_tokens(self) -> int | None:
        return Section.from_config(vars(self.info.get_hf_config())).policy.visual_tokens

    def _cached_apply_hf_processor(self, inputs: Any, timing_ctx: Any) -> Any:
        visual_tokens = self._visual_tokens
        if visual_tokens is None or not (items := inputs.mm_data_items.get("image")):
            return super()._cached_apply_hf_processor(inputs, timing_ctx)  # type: ignore[misc]
        if not isinstance(items, ImageProcessorItems):
            raise UnsupportedUsageError("pictures that come as embeddings cannot be reduced; send the pictures")
        kwargs = inputs.hf_processor_mm_kwargs
        layouts = [self.layout(items.get_image_size(number), kwargs) for number in range(len(items))]
        shares = shares_of(visual_tokens, layouts)
        token = _call.set(_Call(shares, shares))
        try:
            return super()._cached_apply_hf_processor(inputs, timing_ctx)  # type: ignore[misc]
        finally:
            _call.reset(token)

    def _get_mm_hashes(self, inputs: Any) -> Any:
        hashes = super()._get_mm_hashes(inputs)  # type: ignore[misc]
        if (call := _call.get()) is None:
            return hashes
        both = zip(hashes["image"], call.shares, strict=True)
        return {**hashes, "image": [f"{known}-{share.key}" for known, share in both]}

    def _get_cache_missing_items(self, cache: Any, mm_data_items: Any, mm_hashes: Any) -> Any:
        cached, missing = super()._get_cache_missing_items(  # type: ignore[misc]
            cache=cache, mm_data_items=mm_data_items, mm_hashes=mm_hashes
        )
        if (call := _call.get()) is not None:
            both = zip(call.shares, cached["image"], strict=True)
            call.pending = [share for share, is_cached in both if not is_cached]
        return cached, missing

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Any) -> Any:
        processed = super()._apply_hf_processor_main(mm_items=mm_items, hf_kwargs=hf_kwargs)  # type: ignore[misc]
        if (call := _call.get()) is not None and call.pending:
            processed[SHARE] = torch.stack([share.to_tensor() for share in call.pending])
        return processed

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Mapping[str, Any]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)  # type: ignore[misc]
        return {**fields, SHARE: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    def _get_prompt_updates(self, *args: Any, **kwargs: Any) -> Sequence[Any]:
        updates: Sequence[Any] = super()._get_prompt_updates(*args, **kwargs)  # type: ignore[misc]
        call = _call.get()
        if call is None:
            return updates
        return [self._shortened(update, call.pending) if update.modality == "image" else update for update in updates]

    def _shortened(self, update: Any, shares: Sequence[Share]) -> Any:
        def replacement(number: int) -> Any:
            found, share = update.replacement(number), shares[number]
            details = found if isinstance(found, PromptUpdateDetails) else PromptUpdateDetails.from_seq(found)
            whole = torch.ones(len(details.full), dtype=torch.bool)
            embeds = (whole if details.is_embed is None else details.is_embed(details.full)).nonzero().flatten()
            if len(embeds) != share.layout.tokens:
                raise UnsupportedUsageError(
                    f"a picture has {len(embeds)} visual tokens where {share.layout.tokens} were expected: this vLLM "
                    "counts them otherwise; see dop_compile's versions"
                )
            whole[embeds[share.kept :]] = False
            return replace(details, full=[token for token, enters in zip(details.full, whole, strict=True) if enters])

        return replace(update, replacement=replacement)
