"""The tokens of a prompt whose cost is asked for, where nobody says how many there are.

Visual tokens are those of one picture, where the model's configuration fixes their number:

1. a tower of one resolution whose patches are the tokens (LLaVA and its kin): side / patch, squared;
2. a number of its own: `mm_tokens_per_image` (Gemma 3), `num_image_tokens` (PaliGemma), `num_query_tokens` (BLIP-2).
(refused) 3. pictures of any size, and tiles (Qwen2.5-VL, LLaVA-NeXT, InternVL): the number is the picture's.
4. text-only models, whose visual tokens only the caller knows. 5. policies that keep more than a picture has.

System and text tokens are assumed to be those of LLaVA-1.5's template and a question.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers

from dop_compile.hf.names import FIXED_TOWERS, REARRANGED
from dop_compile.policy.policy import Policy

__all__ = ["PictureTokens", "PromptCounts", "assumed_counts", "is_text_only", "picture_tokens"]

# Typed loosely: transformers annotates only a part of what is used here
hf: Any = transformers

SYSTEM, TEXT = 35, 100
ASK = "give visual=, the number of visual tokens of the prompt (system= and text= for the rest)"


@dataclass(frozen=True)
class PictureTokens:
    """Visual tokens of any picture, and how they are known."""

    count: int
    why: str


@dataclass(frozen=True)
class PromptCounts:
    """Tokens of one sample before reduction; `why` says which of them were not given, "" if all were."""

    system: int
    visual: int
    text: int
    why: str = ""


def is_text_only(config: Any) -> bool:
    return type(config) not in hf.AutoModelForImageTextToText._model_mapping and not hasattr(config, "vision_config")


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
            count = (side // patch) ** 2 + extra - (strategy == "default")
            return PictureTokens(count, f"the configuration, {side} x {side} pixels in patches of {patch} x {patch}")
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


def assumed_counts(
    config: Any,
    policies: Mapping[str, Policy],
    system: int | None = None,
    visual: int | None = None,
    text: int | None = None,
    *,
    picture: PictureTokens | None = None,
    ask: str = ASK,
) -> PromptCounts:
    """The counts given, and for those that are None what is known or assumed of a prompt with one picture.

    Args:
        config: the model's.
        policies: by tier.
        picture: what is known of the model's pictures besides its configuration.
        ask: what to do where the number of visual tokens is not known, for messages.

    Raises:
        ValueError: the number of visual tokens is not known, or a policy keeps more of them; the message says whose.
    """
    why = []
    if visual is None:
        visual, reason = _visual(config, policies, picture or picture_tokens(config), ask)
        why.append(reason)
    if assumed := [name for name, value in (("system", system), ("text", text)) if value is None]:
        why.append(f"{' and '.join(assumed)} tokens assumed, as of LLaVA-1.5's prompts")
    return PromptCounts(SYSTEM if system is None else system, visual, TEXT if text is None else text, "; ".join(why))


def _visual(config: Any, policies: Mapping[str, Policy], picture: PictureTokens | None, ask: str) -> tuple[int, str]:
    name = type(config).__name__
    if is_text_only(config):
        pruning = next((tier for tier, policy in policies.items() if _prunes_visual(policy)), None)
        if pruning is not None:
            raise ValueError(
                f"{name} is of a text-only model, whose visual tokens its caller names (token_groups), and tier "
                f"{pruning!r} is about them: {ask}"
            )
        return 0, "no visual tokens in a text-only model"
    if picture is None:
        raise ValueError(f"{name}: how many visual tokens a picture has depends on the picture: {ask}")
    for tier, policy in policies.items():
        if policy.visual_tokens is not None and policy.visual_tokens > picture.count:
            raise ValueError(
                f"tier {tier!r} keeps {policy.visual_tokens} visual tokens, and a picture of this model has "
                f"{picture.count} by {picture.why}; for a prompt of several pictures {ask}"
            )
    return picture.count, f"visual tokens of one picture by {picture.why}"


def _prunes_visual(policy: Policy) -> bool:
    return (
        policy.visual_tokens is not None
        or policy.ranking is not None
        or any(operation.group != "text" for operation in policy.pruned)
    )
