"""From images and a prompt to a model's inputs, by the model's own processor."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from dop_compile.hf.images import load_image

__all__ = ["conversation_inputs", "has_chat_template", "prompt_inputs"]


def has_chat_template(processor: Any) -> bool:
    """Whether the processor knows how a conversation is written."""
    return bool(getattr(processor, "chat_template", None))


def conversation_inputs(processor: Any, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> Any:
    """What the processor makes of conversations, by its chat template; one row each, padded on the left.

    Args:
        conversations: messages with `role` and `content`, a list of parts: {"type": "text", "text"}, {"type": "image",
            "image"}. The answer's beginning is added to each.

    Raises:
        ValueError, TypeError, jinja2.TemplateError: the template or the processor does not take them.
    """
    padding = {"padding": True, "padding_side": "left"} if len(conversations) > 1 else {}
    # Newer releases of transformers want what is for the processor apart
    apart = "processor_kwargs" in inspect.signature(processor.apply_chat_template).parameters
    return processor.apply_chat_template(
        list(conversations),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **({"processor_kwargs": padding} if apart else padding),
    )


def prompt_inputs(processor: Any, prompt: str, images: Sequence[Image.Image]) -> Any:
    """What the processor makes of one prompt: through its chat template where there is one, else as it stands.

    Without a template, image tokens that the prompt lacks are put before it. Images are turned upright.

    Raises:
        ValueError: the prompt holds more image tokens than there are images.
    """
    images = [load_image(image) for image in images]
    if has_chat_template(processor):
        content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": prompt}]
        return conversation_inputs(processor, [[{"role": "user", "content": content}]])
    token = getattr(processor, "image_token", None) or "<image>"
    missing = len(images) - prompt.count(token)
    if missing < 0:
        raise ValueError(f"the prompt holds {prompt.count(token)} {token} for {len(images)} images")
    text = f"{token}\n" * missing + prompt
    return processor(images=images or None, text=text, return_tensors="pt")
