"""A CLIP with random weights and a tokenizer of a few words; nothing is downloaded."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

WORDS = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2, "what": 3, "is": 4, "on": 5, "the": 6, "table": 7}


@functools.cache
def clip() -> Any:
    """A tiny CLIP whose vision tower is as wide as the tiny models', and that reads texts of 8 tokens."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = sizes | ids | {"vocab_size": len(WORDS), "max_position_embeddings": 8}
    vision = sizes | {"image_size": 24, "patch_size": 8}
    torch.manual_seed(3)
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
            elif "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@functools.cache
def tokenizer() -> Any:
    own = Tokenizer(models.WordLevel(WORDS, unk_token="[PAD]"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("[BOS]", 1), ("[EOS]", 2)]
    own.post_processor = TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=special)
    return hf.PreTrainedTokenizerFast(tokenizer_object=own, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]")


def decode(ids: torch.Tensor) -> str:
    names = list(WORDS)[3:]
    return " ".join(names[int(i) % len(names)] for i in ids)
