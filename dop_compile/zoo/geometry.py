"""Sizes of a model by which a published policy is told to fit: those of its decoder, and the tokens of a picture.

Weights are not looked at: a fine-tune of a model has its sizes. Of models that take pictures of any size the tokens are
the picture's, and are not compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dop_compile.hf.dimensions import DecoderDims
from dop_compile.hf.names import FIXED_TOWERS
from dop_compile.hf.pictures import tower_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["Geometry"]


@dataclass(frozen=True)
class Geometry:
    """What a configuration has to say for a policy to fit.

    Args:
        model_type: of the whole model.
        num_hidden_layers, hidden_size, num_attention_heads, num_key_value_heads, intermediate_size: of the decoder.
        picture_tokens: visual tokens of a picture, or of one tile where pictures are cut into tiles; None: any.
    """

    model_type: str
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    picture_tokens: int | None = None

    @property
    def dims(self) -> DecoderDims:
        """The decoder's sizes, as eq. 11 of DOP counts by them."""
        return DecoderDims(
            num_layers=self.num_hidden_layers,
            hidden_size=self.hidden_size,
            num_heads=self.num_attention_heads,
            head_dim=self.hidden_size // self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            intermediate_sizes=(self.intermediate_size,) * self.num_hidden_layers,
        )

    def differences(self, config: PreTrainedConfig) -> tuple[str, ...]:
        """Where a Hugging Face configuration is another model's, as "hidden_size 5120 instead of 4096"."""
        found = _sizes(config)
        wanted = dataclasses.asdict(self)
        return tuple(
            f"{name} {found[name]} instead of {value}"
            for name, value in wanted.items()
            if value is not None and found[name] != value
        )


def _sizes(config: Any) -> Mapping[str, Any]:
    """The fields of `Geometry` as a configuration has them; None for those that it has not."""
    text = config.get_text_config(decoder=True)
    decoder = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    sizes = {name: getattr(text, name, None) for name in decoder}
    sizes["num_key_value_heads"] = sizes["num_key_value_heads"] or sizes["num_attention_heads"]
    return {"model_type": config.model_type, **sizes, "picture_tokens": _picture_tokens(config)}


def _picture_tokens(config: Any) -> int | None:
    """Visual tokens of a tower's whole picture: patches, with what else the tower's output holds, pixels shuffled."""
    vision = getattr(config, "vision_config", None)
    side, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    side, patch = (value[0] if isinstance(value, list | tuple) and value else value for value in (side, patch))
    if not isinstance(side, int) or not isinstance(patch, int):
        return None
    if (ratio := getattr(config, "downsample_ratio", None)) is not None:  # InternVL
        return int((side // patch * ratio) ** 2)
    extra = FIXED_TOWERS.get(getattr(vision, "model_type", ""), 0)
    return tower_tokens(config, side, patch, extra)
