"""Which of a call's tokens are visual, newlines, system, padding: what the host has to know, read back at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dop_compile.errors import UnsupportedUsageError
from dop_compile.runtime.call import Arguments, Call
from dop_compile.runtime.prompt import Prompt
from dop_compile.spans import SELECTION, span
from dop_compile.transfer import read_back
from dop_compile.vision.placing import placed_rows, placement_checks
from dop_compile.vision.prompt import PromptVision

__all__ = ["TokenKinds", "token_counts", "token_kinds", "visual_positions"]


@dataclass(frozen=True)
class TokenKinds:
    """Masks (batch, tokens) bool, on the CPU.

    Args:
        visual: the prompt's image and video placeholders.
        newline: the part of `visual` that is a newline embedding.
        valid: no padding.
        system: what the caller calls so; None where the caller says nothing.
        vision: what is known about the vision tower's work; None where the caller said which tokens are visual.
    """

    visual: Tensor
    newline: Tensor
    valid: Tensor
    system: Tensor | None
    vision: PromptVision | None = None


def token_kinds(
    call: Call,
    embeds: Tensor,
    prompt: int,
    mask: Tensor | None = None,
    *,
    refusals: Sequence[tuple[Tensor, str]] = (),
    with_vision: bool = True,
) -> TokenKinds:
    """The kinds of a call's tokens.

    Args:
        embeds: (batch, tokens, hidden).
        prompt: how many of the tokens are the prompt's.
        mask: (batch, past and new tokens), 0 for padding.
        refusals: of the call's arguments.
        with_vision: whether to find out what is known about the vision tower.

    Raises:
        UnsupportedUsageError: one of the refusals holds.
    """
    batch, tokens = embeds.shape[:2]
    nothing = torch.zeros(batch, tokens, dtype=torch.bool, device="cpu")
    groups = call.token_groups
    masks = [_of_tokens(m) for m in call.visual] if groups is None else []
    parts = call.vision if with_vision else []
    checks = placement_checks(parts, masks, embeds)
    is_newline = nothing
    if call.newline is not None and call.visual:
        is_newline = (embeds == call.newline.to(embeds)).all(dim=-1)
    given = nothing if mask is None else mask[:, -tokens:].bool()
    refused = [refusal for refusal, _ in refusals]
    is_newline, given, *seen = read_back([is_newline, given, *masks, *checks, *refused])
    for refusal, (_, reason) in zip(seen[len(masks) + len(checks) :], refusals, strict=True):
        if bool(refusal):
            raise UnsupportedUsageError(reason)
    valid = ~nothing if mask is None else given
    visual = nothing
    for own in seen[: len(masks)]:
        visual = visual | own
    if groups is not None:
        visual = groups.cpu() == 1
    visual = visual & (torch.arange(tokens, device="cpu") < prompt)
    vision = None
    if groups is None:
        with span(SELECTION) if parts else nullcontext():
            placed = placed_rows(parts, masks, seen, embeds)
            vision = PromptVision(parts, placed, (batch, tokens), call.model)
    system = None if groups is None else groups.cpu() == 2
    return TokenKinds(visual, visual & is_newline, valid, system, vision)


def _of_tokens(mask: Tensor) -> Tensor:
    """(batch, tokens) of a mask that may have values for each feature, most often an expanded one."""
    if mask.dim() < 3:
        return mask
    return mask[..., 0] if mask.stride(-1) == 0 else mask.any(dim=-1)


def visual_positions(call: Call, embeds: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
    """(batch, tokens) bool masks, on the CPU, of the prompt's visual tokens and of newlines among them."""
    kinds = token_kinds(call, embeds, prompt, with_vision=False)
    return kinds.visual, kinds.newline


def token_counts(call: Call, embeds: Tensor, prompt: int, mask: Tensor | None) -> tuple[int, int, int]:
    """System, visual and text tokens of a batch of one, padding left out.

    Newlines inside an image, which no policy drops, are text, and so is what stands behind the prompt.
    """
    kinds = token_kinds(call, embeds, prompt, mask, with_vision=False)
    visual, newline, live = kinds.visual, kinds.newline, kinds.valid
    system = (visual.cumsum(1) == 0 if kinds.system is None else kinds.system) & visual.any()
    total, visual_count, system_count = (
        int(part[0].sum()) for part in (live, visual & ~newline & live, system & ~visual & live)
    )
    return system_count, visual_count, total - system_count - visual_count


def read_prompt(call: Call, arguments: Arguments) -> tuple[Prompt | None, Tensor | None]:
    """The prompt with its groups, None where all new tokens are of one group; and which tokens are no padding.

    Both are None where no new token is the prompt's.
    """
    embeds, cache = arguments.embeds, arguments.cache
    tokens = embeds.shape[1]
    prompt = tokens if call.prompt_tokens is None else call.prompt_tokens
    if prompt == 0:
        return None, None
    kinds = token_kinds(call, embeds, prompt, arguments.attention_mask, refusals=arguments.refusals)
    valid = kinds.valid
    visual, newline = kinds.visual & valid, kinds.newline & valid
    system = kinds.system
    if system is None:
        first = cache is None or cache.columns_seen == 0
        system = (visual.cumsum(dim=1) == 0) & first
    system = system & visual.any(dim=1, keepdim=True) & valid
    if prompt == tokens and not bool((visual | system).any()):
        return None, valid
    output = torch.arange(tokens, device="cpu") >= prompt
    return Prompt(embeds, valid, visual, newline, system, output, kinds.vision, call.input_ids), valid
