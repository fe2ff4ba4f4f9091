"""From conversations to a batch of the model's inputs, by the model's own processor and chat template."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dop_compile.hf import processors
from dop_compile.hf.processors import MissingPart
from dop_compile.plugins.lmms_eval.media import Conversation
from dop_compile.policy.policy import Policy
from dop_compile.reducers import ResizeReducer, resize_processor

__all__ = ["Reader", "load_processor"]


def load_processor(
    pretrained: str,
    template: str | None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    max_tiles: int | None = None,
    **settings: Any,
) -> Any:
    """The checkpoint's processor, padding on the left.

    Args:
        template: a file with a Jinja chat template, for checkpoints without one.
        min_pixels, max_pixels: of a picture, for processors of pictures of any size.
        max_tiles: of a picture without its thumbnail, for processors that cut pictures in square tiles.
        settings: of `from_pretrained`.

    Raises:
        ValueError: no chat template, or limits that the processor does not have.
        ImportError: a package is missing without which it reads no text or no images.
    """
    processor = processors.load_processor(pretrained, **settings)
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if template is not None:
        path = Path(template).expanduser()
        if not path.is_file():
            raise ValueError(f"chat_template={template}: no such file")
        processor.chat_template = path.read_text(encoding="utf-8")
    if not getattr(processor, "chat_template", None):
        raise ValueError(
            f"{pretrained} has no chat template, and prompts cannot be written as it was trained on them; give "
            "chat_template=FILE, a Jinja template with places for images"
        )
    if min_pixels is not None or max_pixels is not None:
        for name in ("image_processor", "video_processor"):
            if not isinstance(getattr(processor, name, None), MissingPart | None):
                setattr(processor, name, _limited(getattr(processor, name), min_pixels, max_pixels))
    if max_tiles is not None:
        pictures = getattr(processor, "image_processor", None)
        if not hasattr(pictures, "max_patches"):
            raise ValueError(
                f"{type(pictures).__name__} has no limit on tiles; max_tiles is for models such as InternVL"
            )
        processor.image_processor = copy.copy(pictures)
        processor.image_processor.max_patches = max_tiles
    return processor


def _limited(pictures: Any, least: int | None, most: int | None) -> Any:
    size = dict(getattr(pictures, "size", None) or {})
    if not size.get("longest_edge") or not hasattr(pictures, "merge_size"):
        raise ValueError(
            f"{type(pictures).__name__} makes pictures of one size; min_pixels and max_pixels are for models that "
            "take pictures of any size, such as Qwen2.5-VL"
        )
    low, high = least or size.get("shortest_edge") or 1, most or size["longest_edge"]
    if low > high:
        if least is not None:
            raise ValueError(f"min_pixels={low} is more than max_pixels={high}")
        low = high
    changed = copy.copy(pictures)
    changed.size = type(pictures.size)(**{**size, "shortest_edge": low, "longest_edge": high})
    return changed


class Reader:
    """Makes batches.

    Args:
        processor: of `load_processor`.
        policy: whose reducer may ask for smaller pictures; None is the untouched model.
    """

    def __init__(self, processor: Any, policy: Policy | None):
        self.processor = processor
        self.tokenizer: Any = getattr(processor, "tokenizer", processor)
        resizes = policy is not None and policy.reducer == ResizeReducer.name
        self._tokens = policy.visual_tokens if policy is not None and resizes else None

    def batches(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        """Numbers of the conversations that are read together: of as many pictures where these are resized."""
        groups: dict[int, list[int]] = {}
        for number, conversation in enumerate(conversations):
            groups.setdefault(len(conversation.images) if self._tokens is not None else 0, []).append(number)
        return list(groups.values())

    def prompts(self, conversations: Sequence[Conversation]) -> list[str]:
        """As the chat template writes them, up to where the answer begins."""
        settings = {"tokenize": False, "add_generation_prompt": True}
        return [self.processor.apply_chat_template(given.messages, **settings) for given in conversations]

    def __call__(self, conversations: Sequence[Conversation]) -> Any:
        """What the model's `generate` takes: (conversations, tokens), padded on the left.

        Raises:
            ValueError: videos, for a processor without them; the reducer is `resize`, and there are more pictures
                than tokens.
        """
        prompts = self.prompts(conversations)
        settings: dict[str, Any] = {"text": prompts, "padding": True, "return_tensors": "pt"}
        if self.tokenizer.bos_token and all(prompt.startswith(self.tokenizer.bos_token) for prompt in prompts):
            settings["add_special_tokens"] = False  # the template wrote them
        images = [given.images for given in conversations]
        videos = [clip for given in conversations for clip in given.videos]
        processor = self.processor
        if any(images):
            processor = self._resized(max(map(len, images)))
            settings["images"] = images
        if videos:
            if getattr(processor, "video_processor", None) is None:
                raise ValueError(
                    f"{type(processor).__name__} takes no videos; frames_as_images=True gives their frames as pictures"
                )
            settings["videos"] = [clip.frames for clip in videos]
            settings["videos_kwargs"] = {
                "do_sample_frames": False,
                "video_metadata": [clip.metadata() for clip in videos],
            }
        if processor is not self.tokenizer:
            return processor(**settings)
        return processor(settings.pop("text"), **settings)

    def continuation_ids(self, prompt: str, continuation: str) -> list[int]:
        """Token ids of what follows a prompt, as the tokenizer splits the two together.

        Raises:
            ValueError: they have no common split at the prompt's end, so that "after the prompt" means nothing.
        """
        before, whole = (
            self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + continuation)
        )
        if whole[: len(before)] != before:
            raise ValueError(
                f"the continuation {continuation!r} merges with the end of the prompt {prompt[-20:]!r} into one token; "
                "its likelihood after the prompt is not defined for this tokenizer"
            )
        return list(whole[len(before) :])

    def _resized(self, images: int) -> Any:
        if self._tokens is None:
            return self.processor
        try:
            return resize_processor(self.processor, self._tokens // images)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"reducer 'resize', {self._tokens} visual tokens for {images} pictures: {error}"
            ) from error
