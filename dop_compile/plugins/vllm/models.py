"""The classes that serve written directories: vLLM's own, pruned, with processors that shorten prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import interns1, llava, llava_next, qwen2_5_vl, qwen2_vl, qwen3_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from dop_compile.plugins.vllm.llava_names import renamed
from dop_compile.plugins.vllm.processors import ImagesOnly, Shortening
from dop_compile.plugins.vllm.pruned import Pruned
from dop_compile.plugins.vllm.shares import Layout
from dop_compile.plugins.vllm.towers import ClassAttention

__all__ = ["DopInternVL", "DopLlava", "DopLlavaNext", "DopQwen2VL", "DopQwen2_5_VL", "DopQwen3VL"]


class LlavaInfo(ImagesOnly, llava.LlavaProcessingInfo):  # type: ignore[misc]
    pass


class LlavaProcessor(Shortening, llava.LlavaMultiModalProcessor):  # type: ignore[misc]
    def layout(self, size: Any, hf_kwargs: Mapping[str, object]) -> Layout:
        return Layout(self.info.get_num_image_tokens(image_width=size.width, image_height=size.height))


@MULTIMODAL_REGISTRY.register_processor(LlavaProcessor, info=LlavaInfo, dummy_inputs=llava.LlavaDummyInputsBuilder)
class DopLlava(Pruned, llava.LlavaForConditionalGeneration):  # type: ignore[misc]
    def _prepare(self) -> None:
        if self._selector is not None and self._selector.needs_attention:
            self._class_attention = ClassAttention(self)

    def _renamed(self, name: str) -> str:
        return renamed(name)

    def _encoded(self, kwargs: dict[str, Any]) -> Any:
        found, _ = super()._encoded(kwargs)
        assert self._selector is not None
        return found, self._class_attention.take() if self._selector.needs_attention else []


class LlavaNextInfo(ImagesOnly, llava_next.LlavaNextProcessingInfo):  # type: ignore[misc]
    pass


class LlavaNextProcessor(Shortening, llava_next.LlavaNextMultiModalProcessor):  # type: ignore[misc]
    def layout(self, size: Any, hf_kwargs: Mapping[str, object]) -> Layout:
        info, encoder = self.info, self.info.get_vision_encoder_info()
        tokens = info.get_num_image_tokens(image_width=size.width, image_height=size.height)
        height, width = llava_next.get_anyres_image_grid_shape(
            image_size=(size.height, size.width),
            grid_pinpoints=info.get_hf_config().image_grid_pinpoints,
            patch_size=encoder.get_image_size(),
        )
        unpadded, rows = info._get_num_unpadded_features(
            original_height=size.height,
            original_width=size.width,
            npatches=encoder.get_patch_grid_length(),
            num_patch_height=height,
            num_patch_width=width,
        )
        return Layout(tokens, rows, unpadded // rows)


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextProcessor, info=LlavaNextInfo, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class DopLlavaNext(Pruned, llava_next.LlavaNextForConditionalGeneration):  # type: ignore[misc]
    def _renamed(self, name: str) -> str:
        return renamed(name)


class InternVLInfo(ImagesOnly, interns1.InternS1ProcessingInfo):  # type: ignore[misc]
    pass


class InternVLProcessor(Shortening, interns1.InternS1MultiModalProcessor):  # type: ignore[misc]
    def layout(self, size: Any, hf_kwargs: Mapping[str, object]) -> Layout:
        tokens = self.info.get_num_image_tokens(
            image_width=size.width,
            image_height=size.height,
            processor=self.info.get_hf_processor(**hf_kwargs),
            mm_kwargs=hf_kwargs,
        )
        return Layout(tokens)


@MULTIMODAL_REGISTRY.register_processor(
    InternVLProcessor, info=InternVLInfo, dummy_inputs=interns1.InternS1DummyInputsBuilder
)
class DopInternVL(Pruned, interns1.InternS1ForConditionalGeneration):  # type: ignore[misc]
    pass


class GridShortening(Shortening):
    """Of models whose image processor makes grids of patches."""

    def layout(self, size: Any, hf_kwargs: Mapping[str, object]) -> Layout:
        tokens = self.info.get_num_image_tokens(
            image_width=size.width,
            image_height=size.height,
            image_processor=self.info.get_image_processor(**hf_kwargs),
            mm_kwargs=hf_kwargs,
        )
        return Layout(tokens)


class Grid(Pruned):
    """Positions in time, height and width."""

    axes = "grid"

    def _offsets(self, kept: Tensor, number: int, kwargs: dict[str, Any]) -> Tensor:
        merge = self.config.vision_config.spatial_merge_size
        columns = int(kwargs["image_grid_thw"][number][2]) // merge
        return torch.stack([torch.zeros_like(kept), kept // columns, kept % columns])

    def _whole_positions(self, length: int, features: Any) -> Tensor:
        positions: Tensor = super(Pruned, self).get_mrope_input_positions([0] * length, features)[0]  # type: ignore[misc]
        return positions


class Qwen2VLInfo(ImagesOnly, qwen2_vl.Qwen2VLProcessingInfo):  # type: ignore[misc]
    pass


class Qwen2VLProcessor(GridShortening, qwen2_vl.Qwen2VLMultiModalProcessor):  # type: ignore[misc]
    pass


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2VLProcessor, info=Qwen2VLInfo, dummy_inputs=qwen2_vl.Qwen2VLDummyInputsBuilder
)
class DopQwen2VL(Grid, qwen2_vl.Qwen2VLForConditionalGeneration):  # type: ignore[misc]
    pass


class Qwen2_5_VLInfo(ImagesOnly, qwen2_5_vl.Qwen2_5_VLProcessingInfo):  # type: ignore[misc]
    pass


class Qwen2_5_VLProcessor(GridShortening, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):  # type: ignore[misc]
    pass


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2_5_VLProcessor, info=Qwen2_5_VLInfo, dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder
)
class DopQwen2_5_VL(Grid, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):  # type: ignore[misc]
    pass


class Qwen3VLInfo(ImagesOnly, qwen3_vl.Qwen3VLProcessingInfo):  # type: ignore[misc]
    pass


class Qwen3VLProcessor(GridShortening, qwen3_vl.Qwen3VLMultiModalProcessor):  # type: ignore[misc]
    pass


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor, info=Qwen3VLInfo, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder
)
class DopQwen3VL(Grid, qwen3_vl.Qwen3VLForConditionalGeneration):  # type: ignore[misc]
    """Its vision tower adds to the decoder's stream behind early layers, too."""

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        rows = 0 if inputs_embeds is None else len(inputs_embeds)
        deepstack = None if inputs_embeds is None else self._get_deepstack_input_embeds(rows)
        hidden = self._decoder(
            self._own_positions(positions),
            inputs_embeds,
            input_ids=input_ids,
            intermediate_tensors=intermediate_tensors,
            deepstack_input_embeds=deepstack,
        )
        self._clear_deepstack_input_embeds(rows)
        return hidden
