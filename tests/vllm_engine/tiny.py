"""Small random checkpoints of families that no shipped model is of, with the shipped models' words and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from digits_vlm import models

__all__ = ["KINDS", "save"]

hf: Any = transformers
LAYERS = 8
VIDEOS = {"qwen2_vl": "Qwen2VLVideoProcessor", "qwen3_vl": "Qwen3VLVideoProcessor"}
_TEXT = {
    "vocab_size": 47,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "bos_token_id": models.BOS,
    "eos_token_id": models.EOS,
    "pad_token_id": models.PAD,
    "tie_word_embeddings": False,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
_IDS = {
    "image_token_id": models.IMAGE,
    "video_token_id": models.VIDEO,
    "vision_start_token_id": models.VISION_START,
    "vision_end_token_id": models.VISION_END,
    "tie_word_embeddings": False,
}
_GRID = {"patch_size": 6, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2}


def _qwen2_vl() -> Any:
    vision = {**_GRID, "depth": 2, "embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2}
    text = {**_TEXT, "rope_parameters": _MROPE}
    return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config=text, vision_config=vision, **_IDS))


def _qwen3_vl() -> Any:
    vision = {**_GRID, "depth": 3, "hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 64}
    vision |= {"num_position_embeddings": 256, "deepstack_visual_indexes": [0, 1]}
    text = {**_TEXT, "rope_parameters": {**_MROPE, "mrope_interleaved": True}}
    return hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(text_config=text, vision_config=vision, **_IDS))


def _llava_next() -> Any:
    vision = hf.CLIPVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, image_size=48, patch_size=8
    )
    config = hf.LlavaNextConfig(
        text_config=hf.LlamaConfig(**_TEXT),
        vision_config=vision,
        image_token_id=models.IMAGE,
        image_grid_pinpoints=[[48, 96], [96, 48], [96, 96]],
        tie_word_embeddings=False,
    )
    return hf.LlavaNextForConditionalGeneration(config)


def _internvl() -> Any:
    vision = hf.InternVLVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=[48, 48],
        patch_size=[6, 6],
        use_qk_norm=False,
    )
    config = hf.InternVLConfig(
        text_config=hf.Qwen2Config(**_TEXT),
        vision_config=vision,
        image_token_id=models.IMAGE,
        tie_word_embeddings=False,
    )
    return hf.InternVLForConditionalGeneration(config)


KINDS = {"qwen2_vl": _qwen2_vl, "qwen3_vl": _qwen3_vl, "llava_next": _llava_next, "internvl": _internvl}


def save(kind: str, directory: Path) -> tuple[Any, Any]:
    """Write a checkpoint; returns its model and processor."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = KINDS[kind]().eval()
    for parameter in model.parameters():  # so that answers depend on what pictures show
        parameter.data.mul_(1.5 if parameter.ndim > 1 else 1.0)
    model.save_pretrained(directory)
    words = models.tokenizer("llava" if kind == "llava_next" else "qwen2_5_vl")
    if kind == "llava_next":
        images = hf.LlavaNextImageProcessorPil(
            size={"shortest_edge": 48},
            crop_size={"height": 48, "width": 48},
            image_grid_pinpoints=[[48, 96], [96, 48], [96, 96]],
        )
        processor = hf.LlavaNextProcessor(
            image_processor=images,
            tokenizer=words,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
        processor.save_pretrained(directory)
        return model, hf.AutoProcessor.from_pretrained(directory)
    if kind == "internvl":
        return model, _internvl_processor(words, directory)
    words.save_pretrained(directory)
    images = models.image_processor("qwen2_5_vl")
    images.save_pretrained(directory)
    name = {"qwen2_vl": "Qwen2VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}[kind]
    video = {
        **images.to_dict(),
        "video_processor_type": "Qwen3VLVideoProcessor" if kind == "qwen3_vl" else "Qwen2VLVideoProcessor",
    }
    video.pop("image_processor_type", None)
    for file, content in {
        "video_preprocessor_config.json": video,
        "processor_config.json": {"processor_class": name},
    }.items():
        (directory / file).write_text(json.dumps(content, default=int))
    return model, hf.AutoProcessor.from_pretrained(directory)


def _internvl_processor(words: Any, directory: Path) -> Any:
    """Its processor asks the tokenizer for marks of pictures by names of its own."""
    marks = {
        "start_image_token": "<|vision_start|>",
        "end_image_token": "<|vision_end|>",
        "context_image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
    }
    named = {name: getattr(words, name) for name in ("pad_token", "bos_token", "eos_token", "unk_token")}
    words = hf.PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer, extra_special_tokens=marks, model_max_length=1024, **named
    )
    images = hf.GotOcr2ImageProcessorPil(
        size={"height": 48, "width": 48}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    video = hf.InternVLVideoProcessor(size={"height": 48, "width": 48})
    hf.InternVLProcessor(images, words, video, image_seq_length=16).save_pretrained(directory)
    return hf.AutoProcessor.from_pretrained(directory)
