"""A LLaVA with random weights, its processor and a picture, for tests that need a model but no answers with a meaning.

Everything but the weights is real: the model class, a CLIP tower, the processor. Nothing is downloaded.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

PATCH = 14
PROMPT = (
    "A chat between a curious human and an assistant. The assistant gives helpful, detailed and polite answers. "
    "USER: <image> What is on the table in this picture, and which colour is it? ASSISTANT:"
)
PAD, BOS, EOS, UNKNOWN, IMAGE = range(5)
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")


def local_processor(image_size: int) -> Any:
    """A LLaVA processor with a tokenizer of `PROMPT`'s words; (image_size / 14) squared visual tokens per image."""
    words = dict.fromkeys(re.findall(r"\w+|[^\w\s]", PROMPT.replace("<image>", "")))
    vocabulary = {word: number for number, word in enumerate((*_SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    size = {"height": image_size, "width": image_size}
    return hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=size),
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def local_llava(*, layers: int, hidden: int, image_size: int) -> Any:
    """A `LlavaForConditionalGeneration` with the vocabulary of `local_processor`, in eval mode."""
    text = hf.LlamaConfig(
        vocab_size=len(local_processor(image_size).tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=hidden**-0.5,
    )
    tower = hf.CLIPVisionConfig(
        hidden_size=hidden // 2,
        intermediate_size=hidden * 2,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=PATCH,
    )
    config = hf.LlavaConfig(
        text_config=text,
        vision_config=tower,
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = hf.LlavaForConditionalGeneration(config).eval()
        model.get_input_embeddings().weight.normal_()
    model.generation_config.suppress_tokens = list(range(len(_SPECIAL)))  # answers are of words, and do not end
    return model


def picture() -> Image.Image:
    """Noise, wider than it is high (120 x 80)."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8))
