"""From images and a prompt to a model's inputs, by the model's own processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from dop_compile.hf.images import load_image

__all__ = ["prompt_inputs"]


def prompt_inputs(processor: Any, prompt: str, images: Sequence[Image.Image]) -> Any:
    """What the processor makes of one prompt: through its chat template where there is one, else as it stands.

    Without a template, image tokens that the prompt lacks are put before it. Images are turned upright.

    Raises:
        ValueError: the prompt holds more image tokens than there are images.
    """
    images = [load_image(image) for image in images]
    if getattr(processor, "chat_template", None):
        content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": prompt}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    token = getattr(processor, "image_token", None) or "<image>"
    missing = len(images) - prompt.count(token)
    if missing < 0:
        raise ValueError(f"the prompt holds {prompt.count(token)} {token} for {len(images)} images")
    text = f"{token}\n" * missing + prompt
    return processor(images=images or None, text=text, return_tensors="pt")
