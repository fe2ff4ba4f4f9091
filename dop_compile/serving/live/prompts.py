"""From messages to a model's inputs, by its own processor and chat template.

(refused) 1. placeholders of pictures in a client's text, which would be taken for pictures. 2. what the template or the
processor does not take: their message is the client's to read. 3. without a chat template: anything but one message of
the user's.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from dop_compile.hf.model_path import placeholder_ids
from dop_compile.hf.prompts import conversation_inputs, has_chat_template, prompt_inputs
from dop_compile.policy.policy import Policy
from dop_compile.reducers import ResizeReducer, resize_processor
from dop_compile.serving.requests import RequestError

__all__ = ["Prompts", "picture_count"]

Messages = Sequence[Mapping[str, Any]]
TOKENS = ("image_token", "video_token", "audio_token", "boi_token", "eoi_token")
"""Attributes of processors that name placeholders."""


class Prompts:
    """Reads messages; from one thread at a time, since tokenizers keep their padding in themselves.

    Args:
        processor: of the model.
        config: its configuration.
    """

    def __init__(self, processor: Any, config: Any):
        self.tokenizer = processor.tokenizer
        self._processor = processor
        self._lock = threading.Lock()
        named = [getattr(processor, name, None) for name in TOKENS]
        ids = self.tokenizer.convert_ids_to_tokens(placeholder_ids(config))
        self._placeholders = sorted({text for text in (*named, *ids) if isinstance(text, str) and text})

    def read(self, conversations: Sequence[Messages], policy: Policy) -> Any:
        """One row of inputs for each conversation, padded on the left; on the CPU.

        Args:
            policy: of the tier that answers; one that resizes has a processor of its own.

        Raises:
            RequestError: a conversation cannot be read.
        """
        for messages in conversations:
            self._check(messages)
        try:
            with self._lock:
                return self._read([_in_parts(messages) for messages in conversations], policy)
        except (TypeError, ValueError, TemplateError) as error:
            raise RequestError(f"messages: the model does not take them: {' '.join(str(error).split())}") from error

    def _read(self, conversations: list[list[dict[str, Any]]], policy: Policy) -> Any:
        processor = self._processor
        if policy.reducer == ResizeReducer.name and policy.visual_tokens is not None:
            pictures = max(picture_count(messages) for messages in conversations)
            if pictures:
                processor = resize_processor(processor, policy.visual_tokens // pictures)
        if has_chat_template(processor):
            return conversation_inputs(processor, conversations)
        ((message,),) = conversations
        texts = [part["text"] for part in message["content"] if part["type"] == "text"]
        return prompt_inputs(processor, "".join(texts), _pictures([message]))

    @property
    def reads_batches(self) -> bool:
        """Whether several conversations can be one batch."""
        return has_chat_template(self._processor)

    @property
    def merge_size(self) -> int:
        """Patches on each side of a token's square, of towers that merge them."""
        return int(getattr(self._processor.image_processor, "merge_size", 1))

    @property
    def crops(self) -> bool:
        """Whether the processor cuts the middle out of a picture."""
        return bool(getattr(self._processor.image_processor, "do_center_crop", False))

    def _check(self, messages: Messages) -> None:
        texts = [part["text"] for part in _parts(messages) if part["type"] == "text"]
        for placeholder in self._placeholders:
            if any(placeholder in text for text in texts):
                raise RequestError(
                    f"messages: a text holds {placeholder!r}, which stands for a picture; leave it out, and send the "
                    "picture as a part of its own"
                )
        if not has_chat_template(self._processor) and [message["role"] for message in messages] != ["user"]:
            raise RequestError("messages: the model has no chat template; send one message of the role 'user'")


def picture_count(messages: Messages) -> int:
    return len(_pictures(messages))


def _pictures(messages: Messages) -> list[Any]:
    return [part["image"] for part in _parts(messages) if part["type"] == "image"]


def _parts(messages: Messages) -> list[Mapping[str, Any]]:
    return [part for message in _in_parts(messages) for part in message["content"]]


def _in_parts(messages: Messages) -> list[dict[str, Any]]:
    """Contents as lists, which every template of a vision-language model takes."""
    return [
        {
            "role": message["role"],
            "content": [{"type": "text", "text": message["content"]}]
            if isinstance(message["content"], str)
            else list(message["content"]),
        }
        for message in messages
    ]
