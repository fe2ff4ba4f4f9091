"""The two models that are trained here: their configurations, tokenizer and image processors.

    model = build("llava")                          # random weights
    save("llava", model, directory)                 # a complete checkpoint
    model, reader = load(directory)                 # and back
    inputs = reader(images, prompts)                # what the model's forward and generate take

`AutoProcessor` does the same as `reader` for `llava`. For `qwen2_5_vl` it needs torchvision, which a CPU build of torch
may not be able to load, so that `reader` puts tokenizer and image processor together itself (as
`dop_compile.hf.processors` does for any model).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers.image_utils import load_image

from digits_vlm import data

__all__ = ["NAMES", "Reader", "build", "load", "save", "tokenizer"]

NAMES = ("llava", "qwen2_5_vl")
PAD, BOS, EOS, UNKNOWN, IMAGE, VIDEO, VISION_START, VISION_END = range(8)
_WORDS = f"{data.SYSTEM} {data.prompt('')} which digit is in row column read is there any how many are none yes no"
_CHAT = (
    "{{ bos_token }}" + data.SYSTEM + "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% set before = ' Answer:' %}{% else %}{% set before = '' %}{% endif %}{{ before }}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ ' IMAGE' }}{% elif part['type'] == 'text' %}{{ ' ' + part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ ' Answer:' }}{% endif %}"
)
_PLACEHOLDER = {"llava": "<image>", "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>"}
_WEIGHTS = "model.safetensors"
SCALE = 0.4


def tokenizer(name: str) -> Any:
    """Whole words, in lower case; every prompt begins with `<s>`."""
    image, video, start, end = (
        ("<image>", "<video>", "<vision>", "</vision>")
        if name == "llava"
        else ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    )
    special = ["<pad>", "<s>", "</s>", "<unk>", image, video, start, end]
    words = re.findall(r"\w+|[^\w\s]", _WORDS.replace("<image>", "").lower())
    words = [*dict.fromkeys([*map(str, range(10)), *data.LETTERS, *words, *"?,.:"])]
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*special, *words])}, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={
            "image_token": image,
            "video_token": video,
            "vision_bos_token": start,
            "vision_eos_token": end,
        },
        padding_side="left",
        model_max_length=1024,
        chat_template=_CHAT.replace("IMAGE", _PLACEHOLDER[name]),
    )


def _text(name: str) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer(name)),
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
    }


def _llava() -> Any:
    vision = transformers.CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=5,  # the last one is not used: features come from the one before it
        num_attention_heads=4,
        image_size=data.CANVAS,
        patch_size=8,
        projection_dim=128,
    )
    text = transformers.LlamaConfig(**_text("llava"), num_key_value_heads=4)
    return transformers.LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(data.CANVAS // 8) ** 2,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )


def _qwen2_5_vl() -> Any:
    vision = {
        "depth": 4,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_heads": 4,
        "patch_size": 6,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 128,
        "fullatt_block_indexes": [0, 1, 2, 3],
        "window_size": 48,
    }
    text = {
        **_text("qwen2_5_vl"),
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
    }
    return transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )


@torch.no_grad()
def _place(tower: Any) -> None:
    """Begin with position embeddings of sines and cosines, as strong as what patches look like.

    Those that transformers draws are so weak that the features hardly say where they come from, and a question for a
    row and a column has nothing to look for.
    """
    weight = next(value for name, value in tower.named_parameters() if name.endswith("position_embedding.weight"))
    side, quarter = int((weight.shape[0] - 1) ** 0.5), weight.shape[1] // 4
    angles = torch.arange(side)[:, None] * 100.0 ** (-torch.arange(quarter) / quarter)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    weight[1:] = SCALE * torch.cat([rows, columns], dim=2).flatten(0, 1)


def build(name: str, seed: int = 0) -> Any:
    """A model with random weights, drawn from the seed."""
    makers = {
        "llava": (_llava, transformers.LlavaForConditionalGeneration),
        "qwen2_5_vl": (_qwen2_5_vl, transformers.Qwen2_5_VLForConditionalGeneration),
    }
    if name not in makers:
        raise ValueError(f"model {name!r}: expected one of {', '.join(NAMES)}")
    configuration, model_class = makers[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(configuration())
        if name == "llava":
            _place(model.model.vision_tower)
    settings = model.generation_config
    settings.max_new_tokens, settings.do_sample = 8, False
    settings.pad_token_id, settings.bos_token_id, settings.eos_token_id = PAD, BOS, EOS
    return model


def image_processor(name: str) -> Any:
    """The processor's image half, in the variant that needs no torchvision."""
    if name == "llava":
        side = {"height": data.CANVAS, "width": data.CANVAS}
        return transformers.CLIPImageProcessorPil(size={"shortest_edge": data.CANVAS}, crop_size=side)
    pixels = {"shortest_edge": 72 * 72, "longest_edge": 192 * 192}
    return transformers.Qwen2VLImageProcessorPil(size=pixels, patch_size=6, merge_size=2, temporal_patch_size=2)


def save(name: str, model: Any, directory: Path) -> None:
    """Write a checkpoint with everything that `from_pretrained` and `pipeline` look for."""
    model.save_pretrained(directory)
    words = tokenizer(name)
    if name == "llava":
        transformers.LlavaProcessor(
            image_processor=image_processor(name),
            tokenizer=words,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=words.chat_template,
        ).save_pretrained(directory)
        return
    words.save_pretrained(directory)
    images = image_processor(name)
    images.save_pretrained(directory)
    # Qwen2_5_VLProcessor cannot be made without torchvision; these are the files that it would write
    video = {**images.to_dict(), "video_processor_type": "Qwen2VLVideoProcessor"}
    video.pop("image_processor_type", None)
    for file, content in {
        "video_preprocessor_config.json": video,
        "processor_config.json": {"processor_class": "Qwen2_5_VLProcessor"},
    }.items():
        (directory / file).write_text(json.dumps(content, indent=2, default=int) + "\n")


class Reader:
    """Images and prompts to model inputs, for a directory that `save` wrote."""

    def __init__(self, directory: Path):
        self.name = json.loads((directory / "config.json").read_text())["model_type"]
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        classes = {"llava": "CLIPImageProcessorPil", "qwen2_5_vl": "Qwen2VLImageProcessorPil"}
        self.images = getattr(transformers, classes[self.name]).from_pretrained(directory)

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> dict[str, Any]:
        """Inputs for a batch, padded on the left: each prompt has one `<image>`, and one image.

        Raises:
            TypeError: something that is not a PIL image.
            ValueError: a prompt without its `<image>`, or a wrong number of images.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images for {len(prompts)} prompts; expected one for each")
        for image in images:
            if not isinstance(image, Image.Image):
                raise TypeError(f"expected PIL images, got {type(image).__name__}; open files with PIL.Image.open")
        for prompt in prompts:
            if prompt.count("<image>") != 1:
                raise ValueError(f"the prompt {prompt!r} must hold <image> once, as data.prompt() writes it")
        pixels = dict(self.images([load_image(image) for image in images], return_tensors="pt"))
        grid = pixels.get("image_grid_thw")
        texts = []
        for number, prompt in enumerate(prompts):
            count = (data.CANVAS // 8) ** 2 if grid is None else int(grid[number].prod()) // self.images.merge_size**2
            placeholder = _PLACEHOLDER[self.name]
            token = "<image>" if self.name == "llava" else "<|image_pad|>"
            texts.append(prompt.replace("<image>", placeholder.replace(token, token * count)))
        inputs = {**self.tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False), **pixels}
        if self.name == "qwen2_5_vl":
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
        return inputs


def load(directory: Path | str) -> tuple[Any, Reader]:
    """Model (in eval mode) and reader of a checkpoint directory.

    Raises:
        FileNotFoundError: no directory, or a file of the checkpoint is missing.
        ValueError: not a checkpoint of one of these models, or a damaged one.
    """
    directory = Path(directory)
    for file in ("config.json", _WEIGHTS, "tokenizer.json"):
        if not (directory / file).is_file():
            raise FileNotFoundError(
                f"{directory / file} is missing; a checkpoint directory holds config.json, {_WEIGHTS}, tokenizer and "
                "processor files (train.py writes one)"
            )
    try:
        kind = json.loads((directory / "config.json").read_text()).get("model_type")
        if kind not in NAMES:
            raise ValueError(f"its model_type is {kind!r}, expected one of {', '.join(NAMES)}")
        model, found = transformers.AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
        if found["missing_keys"]:
            raise ValueError(f"weights are missing: {sorted(found['missing_keys'])[0]} and others")
        return model.eval(), Reader(directory)
    except Exception as error:
        raise ValueError(f"{directory} cannot be loaded: {error}; copy the checkpoint again or retrain it") from error
