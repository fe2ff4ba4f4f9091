"""Which calls of one `generate` belong together, and where each prompt among them ends.

A `generate` may run more than its own prompt through the model: classifier-free guidance, contrastive decoding and
custom loops run a second sequence of calls, a *stream*, with a prompt and a cache of its own. A stream is told by the
cache that a call uses. Calls without a cache hold the whole stream so far: they are told by the prompt that they begin
with. What a caller said about its prompt is for the main stream alone.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

__all__ = ["Stream", "Streams"]


@dataclass
class Stream:
    """Calls that go on from each other.

    Args:
        prompt_columns: where its prompt ends; None: each call is all prompt, but for single tokens behind others.
        main: whether it is the one that the session was begun for.
        prompt: (batch, prompt_columns) ids, of streams without a cache.
    """

    prompt_columns: int | None = None
    main: bool = False
    prompt: Tensor | None = None

    def prompt_tokens(self, past: int, new: int) -> int:
        """How many of a call's new tokens are the prompt's."""
        if self.prompt_columns is None:
            return 0 if past and new == 1 else new
        return min(max(self.prompt_columns - past, 0), new)

    def begins(self, ids: Tensor) -> bool:
        """Whether (batch, tokens) ids begin with the prompt."""
        prompt = self.prompt
        if prompt is None or len(prompt) != len(ids) or ids.shape[1] < prompt.shape[1]:
            return False
        return torch.equal(ids[:, : prompt.shape[1]], prompt)


class Streams:
    """The streams of one session: of one `generate`, or of one plain call, which is the main stream whatever it is."""

    def __init__(self) -> None:
        self.main = Stream(main=True)
        self._generates = False
        self._has_cache = False
        self._with_cache: list[tuple[weakref.ref[Cache], Stream]] = []
        self._without_cache: list[Stream] = []

    def begin_generate(self, prompt_columns: int) -> None:
        """The session is a `generate` with a prompt of so many columns, those of earlier turns counted."""
        self.main.prompt_columns = prompt_columns
        self._generates = True

    def begin_cache(self, cache: Any) -> None:
        """`generate` has made, or was given, a cache for its prompt."""
        if isinstance(cache, Cache):
            self._has_cache = True
            self._with_cache.append((weakref.ref(cache), self.main))

    def of_call(self, cache: Any, ids: Tensor | None, past: int, new: int) -> Stream:
        """The stream that a call belongs to.

        Args:
            cache: what the call was given, or None.
            ids: (batch, tokens) of the call, if it was given any.
            past, new: columns in the cache, and in the call.
        """
        if not self._generates:
            return self.main
        if cache is not None:
            return self._known(cache) or self._begun(cache, past, new)
        if ids is None:
            return self.main if not self._has_cache else Stream(new)
        known = next((stream for stream in self._without_cache if stream.begins(ids)), None)
        if known is not None:
            return known
        # The first call without a cache is the main stream's, if that has none
        first = not self._has_cache and not self._with_cache and not self._without_cache
        columns = self.main.prompt_columns
        main = first and columns is not None and columns <= new
        stream = self.main if main else Stream(new)
        stream.prompt = ids[:, : stream.prompt_columns]
        self._without_cache.append(stream)
        return stream

    def _known(self, cache: Cache) -> Stream | None:
        self._with_cache = [entry for entry in self._with_cache if entry[0]() is not None]
        return next((stream for own, stream in self._with_cache if own() is cache), None)

    def _begun(self, cache: Cache, past: int, new: int) -> Stream:
        """A stream with a cache that is seen for the first time: of the caller, or made in a loop of its own."""
        stream = Stream(past if past and new == 1 else past + new)
        self._with_cache.append((weakref.ref(cache), stream))
        return stream

    def note_cache(self, cache: Any, stream: Stream) -> None:
        """A call of the stream has returned a cache."""
        if self._generates and isinstance(cache, Cache) and self._known(cache) is None:
            self._with_cache.append((weakref.ref(cache), stream))
