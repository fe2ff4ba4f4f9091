"""A compiled model as an engine: requests run in batches of equal settings, which take turns token by token.

1. Requests that come together, with the same tier, sampling and number of pictures, are one batch; Hugging Face's
   `generate` runs it, with its own masks, processors of logits and caches. A row's answer is the one that it gets
   alone, but for rounding where rows of other lengths stand beside it.
2. No request joins a batch that runs. Batches take turns instead, `BATCHES` at a time, so that a new request need not
   wait for a long answer; those that come meanwhile wait for the next batch, together.
3. A request with a seed runs alone, so that its draws do not depend on others.
(refused) 4. Tiers whose reducer is `given`: a client cannot name visual tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dop_compile.errors import UnsupportedUsageError
from dop_compile.serving.live.budget import Budget
from dop_compile.serving.live.draws import Draws
from dop_compile.serving.live.group import Group
from dop_compile.serving.live.patches import read_patches
from dop_compile.serving.live.prompts import Prompts, picture_count
from dop_compile.serving.live.rows import Row
from dop_compile.serving.patches import PatchView
from dop_compile.serving.requests import Event, Request, RequestError

__all__ = ["LiveEngine", "LivePrepared"]

BATCHES = 2
"""Batches that take turns. More would answer first tokens sooner, and all tokens later."""


@dataclass(frozen=True)
class LivePrepared:
    """A request, read.

    Args:
        tier: that will answer.
        prompt_tokens: visual ones included, before reduction.
        inputs: of the model, one row, on the CPU.
    """

    request: Request
    tier: str
    prompt_tokens: int
    inputs: Any

    @property
    def kind(self) -> Hashable:
        """Requests of one kind can be one batch."""
        request = self.request
        drawn = (request.temperature, request.top_p, request.top_k) if request.temperature else ()
        return self.tier, drawn, request.seed if drawn else None, picture_count(request.messages)

    @property
    def is_alone(self) -> bool:
        return bool(self.request.temperature) and self.request.seed is not None


@dataclass(frozen=True)
class _Taken:
    """A request that was admitted."""

    id: int
    prepared: LivePrepared


class LiveEngine:
    """Answers by a compiled model; see `dop_compile.serving.requests.Engine`.

    Args:
        compiled: by `dop_compile`, with tiers.
        processor: of the model, with a tokenizer and an image processor.
        max_batch: requests that are admitted at most.
        measure: time every tier once, for `max_ms`; takes some prefills.

    Raises:
        ValueError: a tier needs what no request says.
    """

    def __init__(self, compiled: Any, processor: Any, *, max_batch: int = 8, measure: bool = True):
        self._model = compiled
        self._policies = dict(compiled.tiers)
        if given := [name for name, policy in self._policies.items() if policy.reducer == "given"]:
            raise ValueError(
                f"tier {given[0]!r}: its visual tokens are given with each call, which a request cannot do"
            )
        self.max_batch = max_batch
        self._prompts = Prompts(processor, compiled.config)
        text = compiled.config.get_text_config(decoder=True)
        self.context_length = int(getattr(text, "max_position_embeddings", None) or 1 << 30)
        ends = compiled.generation_config.eos_token_id
        self._ends = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
        self._waiting: deque[_Taken] = deque()
        self._batches: deque[tuple[Group, list[_Taken]]] = deque()
        self._pads = True
        self._last_id = 0
        self._budget = Budget(self._model, self._prompts, self._policies) if measure else None

    @property
    def tiers(self) -> tuple[str, ...]:
        return tuple(self._policies)

    @property
    def running(self) -> int:
        return len(self._waiting) + sum(row.is_open for group, _ in self._batches for row in group.rows)

    # --- from any thread ------------------------------------------------------------------------------------------

    def prepare(self, request: Request) -> LivePrepared:
        """Read the messages, and choose the tier.

        Raises:
            RequestError: the messages, a tier or a budget that the model does not have; too many tokens.
        """
        tier = request.tier or self.tiers[0]
        if tier not in self._policies:
            raise RequestError(f"tier {tier!r}: expected one of {', '.join(self.tiers)}")
        inputs = self._prompts.read([request.messages], self._policies[tier])
        if request.tier is None and request.max_ms is not None:
            if self._budget is None:
                raise RequestError("max_ms: latencies were not measured when the server was started; name a tier")
            tier = self._budget.choose(request.max_ms, inputs["input_ids"], picture_count(request.messages))
            inputs = self._prompts.read([request.messages], self._policies[tier])
        tokens = int(inputs["input_ids"].shape[1])
        if tokens + request.max_new_tokens > self.context_length:
            raise RequestError(
                f"messages: {tokens} tokens and {request.max_new_tokens} new ones are more than the model's context of "
                f"{self.context_length}; send less, or ask for less"
            )
        return LivePrepared(request, tier, tokens, inputs)

    # --- the engine's thread --------------------------------------------------------------------------------------

    def admit(self, prepared: LivePrepared) -> int:
        """Take a request; its answer begins with one of the next steps."""
        self._last_id += 1
        self._waiting.append(_Taken(self._last_id, prepared))
        return self._last_id

    def step(self) -> list[Event]:
        """The next token of every row of one batch."""
        if self._waiting and len(self._batches) < BATCHES:
            self._begin(self._take())
        if not self._batches:
            return []
        group, taken = self._batches.popleft()
        try:
            events = group.advance()
        except UnsupportedUsageError:
            if len(taken) == 1 or group.has_begun:
                raise
            self._go_unpadded([one for one, row in zip(taken, group.rows, strict=True) if row.is_open])
            return []
        if group.is_open:
            self._batches.append((group, taken))
        return events

    def cancel(self, id: int) -> None:
        """Let go of a request, if it is still there."""
        self._waiting = deque(one for one in self._waiting if one.id != id)
        for group, _ in self._batches:
            for row in group.rows:
                if row.id == id:
                    row.is_open = False
            if not group.is_open:
                group.close()
        self._batches = deque(batch for batch in self._batches if batch[0].is_open)

    def close(self) -> None:
        self._waiting.clear()
        while self._batches:
            self._batches.popleft()[0].close()

    def patches(self, prepared: LivePrepared) -> PatchView:
        """Which visual tokens each layer's later tokens read, by a prefill.

        Raises:
            RequestError: there are no pictures, or their tokens are in no grid that is known.
        """
        return read_patches(self._model, self._prompts, prepared.tier, prepared.inputs)

    def _take(self) -> list[_Taken]:
        """Those that wait and can be one batch with the first of them."""
        first = self._waiting[0].prepared
        taken = [one for one in self._waiting if one.prepared is first or self._fits(one.prepared, first)]
        taken = taken[: self.max_batch]
        ids = {one.id for one in taken}
        self._waiting = deque(one for one in self._waiting if one.id not in ids)
        return taken

    def _fits(self, other: LivePrepared, first: LivePrepared) -> bool:
        if first.is_alone or not self._prompts.reads_batches or other.kind != first.kind:
            return False
        return self._pads or other.prompt_tokens == first.prompt_tokens

    def _begin(self, taken: list[_Taken]) -> None:
        first = taken[0].prepared
        inputs = first.inputs
        if len(taken) > 1:
            conversations = [one.prepared.request.messages for one in taken]
            try:
                inputs = self._prompts.read(conversations, self._policies[first.tier])
            except RequestError:  # each was read alone: together they have shapes that cannot be one batch
                self._go_unpadded(taken)
                return
        rows = [
            Row(one.id, one.prepared.request.max_new_tokens, one.prepared.request.stop, self._ends, self._text)
            for one in taken
        ]
        device = torch.device(self._model.device)
        draws = Draws(device, first.request.seed)
        group = Group(self._model, inputs.to(device, self._model.dtype), _settings(first), rows, draws)
        self._batches.appendleft((group, taken))  # its first token is waited for

    def _go_unpadded(self, taken: list[_Taken]) -> None:
        """The model does not take padded batches, of this kind at least: from now on none are made."""
        self._pads = False
        self._waiting.extendleft(reversed(taken))

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._prompts.tokenizer.decode(ids, skip_special_tokens=True))


def _settings(prepared: LivePrepared) -> dict[str, Any]:
    """Of `generate`; what is not said here is the model's generation configuration's."""
    request = prepared.request
    settings: dict[str, Any] = {"tier": prepared.tier, "num_beams": 1, "num_return_sequences": 1}
    if not request.temperature:
        return {**settings, "do_sample": False}
    drawn = {"temperature": request.temperature, "top_p": request.top_p, "top_k": request.top_k}
    return {**settings, "do_sample": True, **drawn}
