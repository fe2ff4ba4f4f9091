"""How many visual tokens a picture has, where the model's configuration fixes it:

1. a tower of one resolution whose patches are the tokens (LLaVA and its kin): side / patch, squared;
2. a number of its own: `mm_tokens_per_image` (Gemma 3), `num_image_tokens` (PaliGemma), `num_query_tokens` (BLIP-2).
(refused) 3. pictures of any size, and tiles (Qwen2.5-VL, LLaVA-NeXT, InternVL): the number is the picture's.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from dop_compile.hf.names import FIXED_TOWERS, REARRANGED

__all__ = ["PictureTokens", "is_text_only", "picture_tokens", "tower_tokens"]


@dataclass(frozen=True)
class PictureTokens:
    """Visual tokens of any picture, and how they are known."""

    count: int
    why: str


def is_text_only(config: Any) -> bool:
    # Imported here: policies know the zoo, the zoo knows towers, and a policy is read without transformers.
    # Typed loosely: transformers annotates only a part of what is used here.
    hf: Any = importlib.import_module("transformers")
    return type(config) not in hf.AutoModelForImageTextToText._model_mapping and not hasattr(config, "vision_config")


def tower_tokens(config: Any, side: int, patch: int, extra: int) -> int:
    """Tokens of a tower's square picture: patches and `extra` ones, without the first where that is left out."""
    return (side // patch) ** 2 + extra - (getattr(config, "vision_feature_select_strategy", None) == "default")


def picture_tokens(config: Any) -> PictureTokens | None:
    """What a configuration says of the visual tokens of a picture; None where that depends on the picture."""
    if is_text_only(config):
        return None
    vision = getattr(config, "vision_config", None)
    text = config.get_text_config(decoder=True)
    strategy = getattr(config, "vision_feature_select_strategy", None)
    if strategy in ("default", "full") and not any(hasattr(config, name) for name in REARRANGED):
        side, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
        extra = FIXED_TOWERS.get(getattr(vision, "model_type", ""))
        if isinstance(side, int) and isinstance(patch, int) and extra is not None:
            why = f"the configuration, {side} x {side} pixels in patches of {patch} x {patch}"
            return PictureTokens(tower_tokens(config, side, patch, extra), why)
        return None
    own = {
        "mm_tokens_per_image": getattr(config, "mm_tokens_per_image", None),
        "num_image_tokens": getattr(text, "num_image_tokens", None),
        "num_query_tokens": getattr(config, "num_query_tokens", None) if hasattr(config, "image_token_id") else None,
    }
    for name, count in own.items():
        if isinstance(count, int) and count > 0:
            return PictureTokens(count, f"the configuration, {name}")
    return None
