"""The tokens of a prompt whose cost is asked for, where nobody says how many there are.

Visual tokens are those of one picture, where the model's configuration fixes their number
(`dop_compile.hf.pictures`). System and text tokens are assumed to be those of LLaVA-1.5's template and a question.

(refused) 1. text-only models, whose visual tokens only the caller knows. 2. policies that keep more than a picture has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dop_compile.hf.pictures import PictureTokens, is_text_only, picture_tokens
from dop_compile.policy.policy import Policy

__all__ = ["PromptCounts", "assumed_counts"]

SYSTEM, TEXT = 35, 100
ASK = "give visual=, the number of visual tokens of the prompt (system= and text= for the rest)"


@dataclass(frozen=True)
class PromptCounts:
    """Tokens of one sample before reduction; `why` says which of them were not given, "" if all were."""

    system: int
    visual: int
    text: int
    why: str = ""


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
