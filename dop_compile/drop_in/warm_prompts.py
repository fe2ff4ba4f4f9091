"""Prompts to warm a model with: the caller's, or made of the model's configuration; in batches, longer, and padded.

A prompt is one row of a model's inputs. Values per token are the tensors of the shape of `input_ids`. A prompt is made
longer by *fillers*, copies of its last token that is neither visual nor of the system, behind its end.

Made prompts have system tokens, one picture and text. (refused) 1. text-only models, whose visual tokens only the
caller knows. 2. models whose pictures have any number of tokens, or want more than pixels. 3. prompts of several rows,
padded ones, and those whose tokens are not given as ids.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dop_compile.hf.model_path import placeholder_ids
from dop_compile.hf.names import TYPE_IDS
from dop_compile.hf.pictures import is_text_only, picture_tokens

__all__ = ["WarmPrompt", "made_prompt"]

Inputs = Mapping[str, Any]

SYSTEM = 4
"""System tokens of a made prompt."""
PADDING = 3
"""Columns by which the rows of a padded batch differ."""
MASK, IDS, GROUPS = "attention_mask", "input_ids", "token_groups"
NOT_IDS = ("inputs_embeds", "position_ids", "past_key_values")
ASK = "pass inputs=, what the model's processor makes of a prompt"


class WarmPrompt:
    """One row of inputs, checked.

    Args:
        inputs: what `generate` takes for a prompt of one row.
        placeholders: ids of visual tokens.

    Raises:
        TypeError, ValueError: it is not such a row.
    """

    def __init__(self, inputs: Inputs, placeholders: list[int]):
        ids = inputs.get(IDS) if isinstance(inputs, Mapping) else None
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[0] != 1:
            got = f"input_ids of {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"{type(inputs).__name__}"
            raise TypeError(
                f"inputs: expected what generate takes for one prompt, a mapping with input_ids (1, tokens), got {got}"
            )
        if refused := [name for name in NOT_IDS if inputs.get(name) is not None]:
            raise ValueError(f"inputs: {refused[0]} cannot be repeated and made longer; leave it out")
        mask = inputs.get(MASK)
        if mask is not None and not bool((mask == 1).all()):
            raise ValueError("inputs: the prompt is padded; give one without padding, and padded=True for that")
        self.inputs: dict[str, Any] = {**inputs, MASK: torch.ones_like(ids)}
        groups = inputs.get(GROUPS)
        if isinstance(groups, Tensor):
            visual, text = groups == 1, groups == 0
        else:
            visual = torch.isin(ids, torch.tensor(placeholders, device=ids.device, dtype=ids.dtype))
            text = ~visual & ((visual.cumsum(1) > 0) | ~visual.any())
        if not bool(text.any()):
            raise ValueError("inputs: the prompt has no text behind its pictures; a question is needed there")
        self._placeholders = placeholders
        self._filler = int(text[0].nonzero().max())
        self.text_length = int(text.sum())

    def lengthened(self, text_length: int) -> WarmPrompt:
        """The prompt with so many text tokens.

        Raises:
            ValueError: it has more.
        """
        missing = text_length - self.text_length
        if missing < 0:
            raise ValueError(
                f"text_lengths: the prompt given has {self.text_length} text tokens already, and {text_length} are "
                "asked for; give a shorter prompt, or leave text_lengths out"
            )
        more = {name: torch.cat([v, self._fillers(v, missing)], 1) for name, v in self._per_token().items()}
        return WarmPrompt({**self.inputs, **more}, self._placeholders)

    def batch(self, rows: int, *, padded: bool) -> dict[str, Any]:
        """The prompt so many times; where `padded`, the others are longer than the first, which is padded before it."""
        batch = {
            name: torch.cat([value] * rows) if isinstance(value, Tensor) else value
            for name, value in self.inputs.items()
        }
        if padded:
            for name, value in self._per_token().items():
                more = self._fillers(value, PADDING)
                first = torch.cat([torch.zeros_like(more) if name == MASK else more, value], 1)
                batch[name] = torch.cat([first, *[torch.cat([value, more], 1)] * (rows - 1)])
        return batch

    def _per_token(self) -> dict[str, Tensor]:
        shape = self.inputs[IDS].shape
        return {
            name: value
            for name, value in self.inputs.items()
            if isinstance(value, Tensor) and value.shape == shape and not value.is_floating_point()
        }

    def _fillers(self, value: Tensor, count: int) -> Tensor:
        return value[:, self._filler : self._filler + 1].expand(1, count)


def made_prompt(model: Any, text_length: int) -> WarmPrompt:
    """A prompt of system tokens, one picture and so many text tokens, as the configuration says.

    Raises:
        ValueError: the configuration does not say enough.
    """
    config = model.config
    name = type(model).__name__
    if is_text_only(config):
        raise ValueError(
            f"{name} is a text-only model, whose visual tokens only the caller knows; {ASK}, and the token_groups"
        )
    picture = picture_tokens(config)
    placeholders = placeholder_ids(config)
    vision = getattr(config, "vision_config", None)
    side = getattr(vision, "image_size", None)
    if picture is None or not placeholders or not isinstance(side, int):
        raise ValueError(f"{name}: its configuration does not say what a picture is in its inputs; {ASK}")
    text = config.get_text_config(decoder=True)
    special = {*placeholders, *_ids(text), *_ids(model.generation_config)}
    ordinary = next(number for number in range(1, text.vocab_size) if number not in special)
    ids = [ordinary] * SYSTEM + [placeholders[0]] * picture.count + [ordinary] * text_length
    # Noise, always the same: reducers compare tokens
    noise = torch.rand(1, 3, side, side, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    inputs: dict[str, Any] = {
        IDS: torch.tensor([ids], device=model.device),
        "pixel_values": noise.to(model.device, model.dtype),
    }
    wanted = inspect.signature(type(model).forward).parameters
    types = (inputs[IDS] == placeholders[0]).long()
    return WarmPrompt(inputs | {kind: types for kind in TYPE_IDS if kind in wanted}, placeholders)


def _ids(settings: Any) -> set[int]:
    """Ids with a meaning of their own."""
    values = (getattr(settings, f"{name}_token_id", None) for name in ("pad", "bos", "eos"))
    return {number for value in values for number in (value if isinstance(value, list) else [value]) if number}
