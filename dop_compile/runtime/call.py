"""What one forward call of a compiled model says: the outer model's part of it, and the decoder's arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dop_compile.policy.policy import Policy
from dop_compile.runtime.cache import PrunedCache
from dop_compile.runtime.outer_masks import DeferredMask, DeferredMasks
from dop_compile.vision.features import TokenFeatures

__all__ = ["Arguments", "Call"]


@dataclass
class Call:
    """What the outer model's forward call tells its decoder; one per call, so that threads do not share it.

    Args:
        tier, policy: what to run.
        rows: number of last rows whose output is wanted; 0 for all.
        prompt_tokens: how many of the new tokens are the prompt's; those after them were generated (group `output`).
            None: all.
        batch: number of rows.
        visual: masks of placeholder positions, noted while the outer model merges features.
        newline: the embedding of newlines inside image placeholders, for models that have one.
        token_groups: the caller's groups for text-only models: 0 text, 1 visual, 2 system.
        given: visual token indices per sample for the reducer "given".
        vision: what was seen of the vision tower, one entry per call of a feature method.
        input_ids: (batch, tokens) of the call, if the caller passed them.
        model: the model's name, for messages.
        first_layer: the layer to begin at.
        stream: (batch, tokens, hidden) residual stream that enters it, if it is not the first one.
        done: whether the outer model has called its decoder.
    """

    tier: str
    policy: Policy
    rows: int = 0
    prompt_tokens: int | None = None
    batch: int = 1
    visual: list[Tensor] = field(default_factory=list)
    newline: Tensor | None = None
    token_groups: Tensor | None = None
    given: Sequence[Any] | None = None
    vision: list[TokenFeatures] = field(default_factory=list)
    input_ids: Tensor | None = None
    model: str = "this model"
    first_layer: int = 0
    stream: Tensor | None = None
    done: bool = False


@dataclass(frozen=True)
class Arguments:
    """A decoder call's arguments after checking.

    Args:
        masks: what the outer model built, if it builds masks.
        packed: features of visual tokens, (their number, hidden) each.
        packed_mask: (batch, tokens) or (batch, tokens, 1) bool, the tokens they belong to.
        packed_name, packed_keys: the argument they came in, and their keys if that was a dictionary.
        token_inputs: other tensors (batch, tokens, ...) by name.
        refusals: what the call is refused for, with the reason, once the host has read whether it is so.
    """

    embeds: Tensor
    attention_mask: Tensor | None
    masks: DeferredMask | DeferredMasks | None
    positions: Tensor | None
    cache: PrunedCache | None
    packed: tuple[Tensor, ...]
    packed_mask: Tensor | None
    constants: tuple[tuple[str, Any], ...]
    packed_name: str = "deepstack_visual_embeds"
    packed_keys: tuple[Any, ...] | None = None
    token_inputs: dict[str, Tensor] = field(default_factory=dict)
    refusals: list[tuple[Tensor, str]] = field(default_factory=list)
