"""Tiny, randomly initialised models of the real Hugging Face classes, and inputs like their processors'.

A `Family` builds a model (hidden 64, 4 or 6 layers, vocabulary 128) and makes batches from a description of
each row: `[("text", 5), ("image",), ("text", 4), ("video",), ("text", 3)]`. `("image", k)` asks for the k-th
image size of a family that has several. Ids that a real prompt has around and inside an image, but that hold
no visual feature (start and end markers, row breaks of Mistral 3, timestamps of Qwen3-VL videos), belong to
the segment.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.reference import FINAL_NORMS, named_child, text_decoder

PAD, BOS, EOS, IMAGE, VIDEO, START, END, BREAK = range(8)
FIRST_ORDINARY_ID, VOCAB = 16, 128
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 4, 2, 16

Segment = tuple[Any, ...]


@dataclass(frozen=True)
class Visual:
    """One image or video: its part of `input_ids`, and its tensors, joined along the first dimension."""

    ids: list[int]
    tensors: dict[str, Tensor]


VisualMaker = Callable[[nn.Module, int, torch.Generator], Visual]


@dataclass(frozen=True)
class Family:
    """A model class with a tiny configuration and a maker of inputs.

    `type_ids` names the tensors that mark image (1) and video (2) placeholders, for classes that want some.
    `tower_per_row` is SmolVLM's layout: pixel values (batch, images, 3, height, width), zeros where a row has
    fewer images than another.
    """

    name: str
    model_class: type[nn.Module]
    config: Callable[[], hf.PreTrainedConfig]
    image: VisualMaker | None = None
    video: VisualMaker | None = None
    type_ids: str | None = None
    tower_per_row: bool = False
    has_mrope: bool = False
    has_deepstack: bool = False
    has_newlines: bool = False
    has_sliding_layers: bool = False
    has_bidirectional_images: bool = False
    has_bidirectional_prefix: bool = False
    has_absolute_positions: bool = False  # a shifted prompt is another prompt: padding needs `position_ids`
    has_batch_positions: bool = False  # images are numbered through the batch: rows alone need `position_ids`
    images_are_videos: bool = False  # `image` makes one: the class has no other
    has_states: bool = False  # layers that keep a recurrent or convolutional state
    is_parallel: bool = False  # attention and MLP read the same normalised state
    replays_from: int | None = None  # later layers read keys of this one: a prompt is taken up no later than here
    num_layers: int = LAYERS
    seed: int = 0  # of the weights: another one where the model answers with a placeholder, or magnifies rounding
    needs_image: bool = False  # every row has one
    eager_only: bool = False  # a part of the model has no other attention

    @property
    def has_video(self) -> bool:
        return self.video is not None

    @property
    def is_text_only(self) -> bool:
        return self.image is None

    @property
    def has_logits_to_keep(self) -> bool:
        return "logits_to_keep" in inspect.signature(self.model_class.forward).parameters

    @property
    def attentions(self) -> tuple[str, ...]:
        """Attention implementations that the class has, of those that are supported."""
        return ("sdpa", "eager") if self.model_class._supports_sdpa and not self.eager_only else ("eager",)

    def build(self, seed: int | None = None, dtype: torch.dtype = torch.float32, attn: str | None = None) -> nn.Module:
        """The model in eval mode, the same for the same seed. It has no end-of-sequence token."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed if seed is None else seed)
            model = self.model_class._from_config(self.config(), attn_implementation=attn or self.attentions[0])
            _initialise(model)
        model.generation_config = hf.GenerationConfig(pad_token_id=PAD, bos_token_id=BOS)
        return model.to(dtype).eval()

    def make_inputs(
        self,
        model: nn.Module,
        rows: Sequence[Sequence[Segment]],
        padding: str = "left",
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` (batch, tokens), and what the class wants for images and videos.

        Padding is PAD with attention 0. A batch without images has no pixel values.
        """
        ids, visuals = self._rows(model, rows, seed)
        inputs = _pad(ids, padding)
        if self.has_absolute_positions:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        if self.type_ids:
            types = (inputs["input_ids"] == IMAGE).long() + 2 * (inputs["input_ids"] == VIDEO).long()
            types = types * inputs["attention_mask"] * (not self.has_bidirectional_prefix)
            inputs |= dict.fromkeys(self.type_ids.split(), types)
        inputs |= self._join(visuals)
        if self.has_batch_positions:
            known = {name: value for name, value in inputs.items() if not value.is_floating_point()}
            inputs["position_ids"] = model.base_model.get_rope_index(**known)[0]
        return {
            name: value.to(device=device, dtype=model.dtype if value.is_floating_point() else value.dtype)
            for name, value in inputs.items()
        }

    def make_towers(
        self, model: nn.Module, rows: Sequence[Sequence[Segment]], seed: int = 0
    ) -> list[dict[str, Tensor]]:
        """Each row's own images and videos, of the batch that `make_inputs` makes."""
        return [
            {n: v.to(model.device, model.dtype if v.is_floating_point() else v.dtype) for n, v in tower.items()}
            for tower in (self._join([row]) for row in self._rows(model, rows, seed)[1])
        ]

    def item_sizes(self, model: nn.Module, rows: Sequence[Sequence[Segment]], seed: int = 0) -> list[list[int]]:
        """Per row, the placeholders of each image and video of the batch that `make_inputs` makes."""
        visuals = self._rows(model, rows, seed)[1]
        return [[sum(number in (IMAGE, VIDEO) for number in visual.ids) for visual in row] for row in visuals]

    def _join(self, visuals: list[list[Visual]]) -> dict[str, Tensor]:
        return _join_per_row(visuals) if self.tower_per_row else _join([v for row in visuals for v in row])

    def _rows(
        self, model: nn.Module, rows: Sequence[Sequence[Segment]], seed: int
    ) -> tuple[list[list[int]], list[list[Visual]]]:
        generator = torch.Generator().manual_seed(seed)
        ids: list[list[int]] = []
        visuals: list[list[Visual]] = []
        for row in rows:
            row_ids: list[int] = []
            row_visuals: list[Visual] = []
            for kind, *argument in row:
                if kind == "text":
                    row_ids += _random_ids(argument[0], generator)
                    continue
                maker = {"image": self.image, "video": self.video}[kind]
                if maker is None:
                    raise ValueError(f"{self.name} takes no {kind}.")
                visual = maker(model, argument[0] if argument else 0, generator)
                row_ids += visual.ids
                row_visuals.append(visual)
            ids.append(row_ids)
            visuals.append(row_visuals)
        return ids, visuals


def _random_ids(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(FIRST_ORDINARY_ID, VOCAB, (count,), generator=generator).tolist()


def _initialise(model: nn.Module) -> None:
    """Weights of unit gain and norms that differ per channel, so that every operation shows in the logits.

    Tied embeddings are small against the branches (or every model would repeat its last token), and the final
    norm makes up for it.
    """
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.shape[0] == VOCAB and parameter is model.get_input_embeddings().weight:
                parameter.normal_(std=0.05 if tied else 1.0)
            elif "experts" in name:
                parameter.normal_(std=max(parameter.shape[1:]) ** -0.5)
            else:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
        if tied:
            named_child(text_decoder(model), FINAL_NORMS).weight.add_(6.0)
        else:
            model.get_output_embeddings().weight.mul_(3.0)


def _pad(ids: list[list[int]], padding: str) -> dict[str, Tensor]:
    if padding not in ("left", "right"):
        raise ValueError(f"padding is 'left' or 'right', not {padding!r}.")
    length = max(len(row) for row in ids)
    input_ids = torch.full((len(ids), length), PAD)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(ids):
        place = slice(length - len(row), length) if padding == "left" else slice(0, len(row))
        input_ids[index, place] = torch.tensor(row)
        attention_mask[index, place] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _join(visuals: list[Visual]) -> dict[str, Tensor]:
    """Concatenate along the first dimension, the other dimensions zero-padded to the largest."""
    before = 0
    for visual in visuals:  # Molmo 2 numbers the patches of all images
        if "image_token_pooling" in visual.tensors:
            visual.tensors["image_token_pooling"] = visual.tensors["image_token_pooling"] + before
            before += visual.tensors["pixel_values"].shape[:2].numel()
    if any("target_sizes" in visual.tensors for visual in visuals):  # MiniCPM-V's patches stand side by side
        strip = torch.cat([visual.tensors["pixel_values"] for visual in visuals], dim=-1)
        return {"pixel_values": strip, "target_sizes": torch.cat([v.tensors["target_sizes"] for v in visuals])}
    names = {name: None for visual in visuals for name in visual.tensors}
    return {n: _cat_padded([v.tensors[n] for v in visuals if n in v.tensors]) for n in names}


def _join_per_row(visuals: list[list[Visual]]) -> dict[str, Tensor]:
    """As `_join`, with a batch dimension and zeros for the rows without images."""
    empty = {n: torch.zeros_like(t) for row in visuals for visual in row for n, t in visual.tensors.items()}
    return {
        name: _cat_padded([torch.cat([visual.tensors[name] for visual in row] or [zeros])[None] for row in visuals])
        for name, zeros in empty.items()
    }


def _cat_padded(tensors: list[Tensor]) -> Tensor:
    shape = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        out = tensor.new_zeros((tensor.shape[0], *shape))
        out[(slice(None), *(slice(size) for size in tensor.shape[1:]))] = tensor
        padded.append(out)
    return torch.cat(padded)


# What one image or video of each family is.


def _square(tokens: int, side: int, marked: bool = False, pixel_mask: bool = False) -> VisualMaker:
    """Images of one size: (1, 3, side, side) and `tokens` placeholders, between START and END if `marked`."""

    def make(model: nn.Module, variant: int, generator: torch.Generator) -> Visual:
        accepted = inspect.signature(type(model).forward).parameters
        # Video-LLaVA's older releases call it `pixel_values_images`.
        name = "pixel_values" if "pixel_values" in accepted else "pixel_values_images"
        tensors = {name: torch.randn(1, 3, side, side, generator=generator)}
        if pixel_mask:
            tensors["pixel_attention_mask"] = torch.ones(1, side, side, dtype=torch.long)
        ids = [IMAGE] * tokens
        return Visual([START, *ids, END] if marked else ids, tensors)

    return make


def _llava_next_image(model: nn.Module, variant: int, generator: torch.Generator) -> Visual:
    """Base image and tiles of 16 x 16; the number of placeholders is what the class itself packs."""
    size = [(16, 32), (32, 16), (30, 21)][variant % 3]
    tiles = 1 + [2, 2, 4][variant % 3]
    pixels = torch.randn(1, tiles, 3, 16, 16, generator=generator)
    sizes = torch.tensor([size])
    with torch.no_grad():
        features = model.get_image_features(pixels.to(model.device, model.dtype), sizes).pooler_output
    return Visual([IMAGE] * features[0].shape[0], {"pixel_values": pixels, "image_sizes": sizes})


def _mistral3_image(model: nn.Module, variant: int, generator: torch.Generator) -> Visual:
    """Rows of placeholders, a BREAK id after each row and END after the last, as the processor has it."""
    height, width = [(3, 3), (2, 4), (4, 3)][variant % 3]
    ids: list[int] = []
    for _ in range(height):
        ids += [IMAGE] * width + [BREAK]
    pixels = torch.randn(1, 3, height * 8, width * 8, generator=generator)
    sizes = torch.tensor([[height * 8, width * 8]])
    return Visual([*ids[:-1], END], {"pixel_values": pixels, "image_sizes": sizes})


def _qwen_image(model: nn.Module, variant: int, generator: torch.Generator) -> Visual:
    _, height, width = grid = [(1, 6, 6), (1, 4, 8), (1, 4, 4)][variant % 3]
    pixels = torch.randn(height * width, 96, generator=generator)
    ids = [START, *[IMAGE] * (height * width // 4), END]
    return Visual(ids, {"pixel_values": pixels, "image_grid_thw": torch.tensor([grid])})


def _qwen2_5_video(model: nn.Module, variant: int, generator: torch.Generator) -> Visual:
    frames, height, width = grid = [(2, 4, 4), (3, 4, 6)][variant % 2]
    pixels = torch.randn(frames * height * width, 96, generator=generator)
    tensors = {
        "pixel_values_videos": pixels,
        "video_grid_thw": torch.tensor([grid]),
        "second_per_grid_ts": torch.tensor([0.5]),
    }
    return Visual([START, *[VIDEO] * (frames * height * width // 4), END], tensors)


def _qwen3_video(model: nn.Module, variant: int, generator: torch.Generator) -> Visual:
    """Every frame has its own run of placeholders, after a timestamp written as text."""
    frames, height, width = grid = [(2, 4, 4), (3, 4, 6)][variant % 2]
    pixels = torch.randn(frames * height * width, 96, generator=generator)
    ids: list[int] = []
    for _ in range(frames):
        ids += [*_random_ids(2, generator), START, *[VIDEO] * (height * width // 4), END]
    return Visual(ids, {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([grid])})


def _video_llava_video(model: nn.Module, variant: int, generator: torch.Generator) -> Visual:
    """Two frames of 9 patches and their [CLS] token, which this class keeps for videos."""
    return Visual([VIDEO] * 20, {"pixel_values_videos": torch.randn(1, 2, 3, 24, 24, generator=generator)})


# Configurations.


def _text(config: type[hf.PreTrainedConfig], **overrides: Any) -> hf.PreTrainedConfig:
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 512}
    tokens = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": None, "tie_word_embeddings": False}
    settings: dict[str, Any] = sizes | heads | tokens
    return config(**(settings | overrides))


def _tower(config: type[hf.PreTrainedConfig], side: int = 24, patch: int = 4, **overrides: Any) -> Any:
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return config(**(settings | {"image_size": side, "patch_size": patch} | overrides))


def _llava() -> hf.PreTrainedConfig:
    text, tower = _text(hf.LlamaConfig, num_key_value_heads=HEADS), _tower(hf.CLIPVisionConfig, patch=8)
    return hf.LlavaConfig(text_config=text, vision_config=tower, image_token_index=IMAGE)


def _llava_next() -> hf.PreTrainedConfig:
    return hf.LlavaNextConfig(
        text_config=_text(hf.MistralConfig, sliding_window=None),
        vision_config=_tower(hf.CLIPVisionConfig, side=16, patch=8),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )


def _video_llava() -> hf.PreTrainedConfig:
    text, tower = _text(hf.LlamaConfig, num_key_value_heads=HEADS), _tower(hf.CLIPVisionConfig, patch=8)
    return hf.VideoLlavaConfig(text_config=text, vision_config=tower, image_token_index=IMAGE, video_token_index=VIDEO)


_QWEN_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4}
_QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
_QWEN_IDS |= {"vision_start_token_id": START, "vision_end_token_id": END}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def _qwen2_5_vl() -> hf.PreTrainedConfig:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

    tower = _QWEN_TOWER | {"out_hidden_size": HIDDEN, "window_size": 16, "fullatt_block_indexes": [1]}
    text = _text(Qwen2_5_VLTextConfig, rope_parameters=dict(_MROPE))
    return hf.Qwen2_5_VLConfig(text_config=text.to_dict(), vision_config=tower, **_QWEN_IDS)


def _qwen3_vl() -> hf.PreTrainedConfig:
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig

    tower = _QWEN_TOWER | {
        "depth": 3,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 1],
    }
    text = _text(Qwen3VLTextConfig, head_dim=HEAD_DIM, rope_parameters=_MROPE | {"mrope_interleaved": True})
    return hf.Qwen3VLConfig(text_config=text.to_dict(), vision_config=tower, **_QWEN_IDS)


def _internvl() -> hf.PreTrainedConfig:
    tower = _tower(hf.InternVLVisionConfig, image_size=[24, 24], patch_size=[4, 4])
    return hf.InternVLConfig(
        text_config=_text(hf.Qwen2Config),
        vision_config=tower,
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


_SLIDING = ["sliding_attention", "sliding_attention", "full_attention"]


def _gemma3() -> hf.PreTrainedConfig:
    text = _text(
        hf.Gemma3TextConfig,
        num_hidden_layers=6,
        head_dim=HEAD_DIM,
        query_pre_attn_scalar=HEAD_DIM,
        sliding_window=8,
        layer_types=_SLIDING * 2,
        tie_word_embeddings=True,
    )
    return hf.Gemma3Config(
        text_config=text,
        vision_config=_tower(hf.SiglipVisionConfig),
        mm_tokens_per_image=9,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        eos_token_id=None,
    )


def _mistral3() -> hf.PreTrainedConfig:
    return hf.Mistral3Config(
        text_config=_text(hf.MistralConfig, head_dim=HEAD_DIM, sliding_window=None),
        vision_config=_tower(hf.PixtralVisionConfig, side=32),
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )


def _smolvlm() -> hf.PreTrainedConfig:
    tower = _tower(hf.SmolVLMVisionConfig)
    return hf.SmolVLMConfig(
        text_config=_text(hf.LlamaConfig), vision_config=tower, image_token_id=IMAGE, pad_token_id=PAD
    )


def _cohere2_vision() -> hf.PreTrainedConfig:
    text = _text(
        hf.Cohere2Config,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        logit_scale=0.5,
        tie_word_embeddings=True,
    )
    return hf.Cohere2VisionConfig(
        text_config=text,
        vision_config=_tower(hf.SiglipVisionConfig),
        image_token_id=IMAGE,
        alignment_intermediate_size=96,
    )


_PLAIN, _MARKED = _square(9, 24), _square(9, 24, marked=True)
_SMOLVLM_IMAGE = _square(9, 24, marked=True, pixel_mask=True)
_QWEN2_5, _QWEN3 = hf.Qwen2_5_VLForConditionalGeneration, hf.Qwen3VLForConditionalGeneration
_MROPE_FLAGS: dict[str, Any] = {"type_ids": "mm_token_type_ids", "has_mrope": True}
_SLIDES: dict[str, Any] = {"has_sliding_layers": True}
_GEMMA3_FLAGS = _SLIDES | {"type_ids": "token_type_ids", "has_bidirectional_images": True, "num_layers": 6}
_COHERE2, _LLAVA_NEXT = hf.Cohere2VisionForConditionalGeneration, hf.LlavaNextForConditionalGeneration

_ALL = (
    Family("llava", hf.LlavaForConditionalGeneration, _llava, _PLAIN),
    Family("llava_next", _LLAVA_NEXT, _llava_next, _llava_next_image, has_newlines=True),
    Family("qwen2_5_vl", _QWEN2_5, _qwen2_5_vl, _qwen_image, _qwen2_5_video, **_MROPE_FLAGS),
    Family("qwen3_vl", _QWEN3, _qwen3_vl, _qwen_image, _qwen3_video, has_deepstack=True, **_MROPE_FLAGS),
    Family("internvl", hf.InternVLForConditionalGeneration, _internvl, _MARKED),
    Family("video_llava", hf.VideoLlavaForConditionalGeneration, _video_llava, _PLAIN, _video_llava_video),
    Family("gemma3", hf.Gemma3ForConditionalGeneration, _gemma3, _MARKED, **_GEMMA3_FLAGS),
    Family("mistral3", hf.Mistral3ForConditionalGeneration, _mistral3, _mistral3_image),
    Family("smolvlm", hf.SmolVLMForConditionalGeneration, _smolvlm, _SMOLVLM_IMAGE, tower_per_row=True),
    Family("cohere2_vision", _COHERE2, _cohere2_vision, _MARKED, is_parallel=True, **_SLIDES),
    Family("llama", hf.LlamaForCausalLM, lambda: _text(hf.LlamaConfig)),
    Family("qwen2", hf.Qwen2ForCausalLM, lambda: _text(hf.Qwen2Config)),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
