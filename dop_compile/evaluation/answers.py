"""One question asked of the untouched model, or of a compiled one under a policy, and what the answer took."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dop_compile.drop_in.frame import Frame, Session
from dop_compile.evaluation.clock import Clock
from dop_compile.evaluation.memory import PeakMemory
from dop_compile.hf.model_path import decoder_path
from dop_compile.hf.spellings import cache_of
from dop_compile.policy.policy import Policy
from dop_compile.runtime.slots import Call, token_counts

__all__ = ["Answer", "Asker", "prompt_counts"]

GREEDY = {"do_sample": False, "num_beams": 1}
GROUPS = "token_groups"
"""What a text-only model's sample says of its tokens: for the compiled model, not for the original."""


@dataclass(frozen=True)
class Answer:
    """A greedy answer.

    Args:
        ids: (tokens,) the new ones, on the CPU.
        vision_ms, selection_ms, prefill_ms: see `dop_compile.evaluation.clock`.
        decode_ms: per token after the first; None where there is only one.
        memory_bytes: the peak, see `dop_compile.evaluation.memory`; None where it is not known.
        dropped: visual tokens that did not enter the decoder.
    """

    ids: Tensor
    vision_ms: float
    selection_ms: float
    prefill_ms: float
    decode_ms: float | None
    memory_bytes: int | None
    dropped: int = 0


class Asker:
    """Asks one model under many policies.

    Args:
        model: the untouched model.
        compiled: what `dop_compile` made of it.
        settings: of `generate`, beside greedy decoding.
    """

    def __init__(self, model: Any, compiled: Any, settings: Mapping[str, Any]):
        self._model, self._compiled, self._settings = model, compiled, {**settings, **GREEDY}
        self._decoder = model.get_submodule(decoder_path(model))
        self.memory = PeakMemory(model.device)

    @torch.no_grad()
    def ask(self, inputs: Mapping[str, Any], policy: Policy | None) -> Answer:
        """The answer under a policy; of the untouched model if None. `inputs` are of one row."""
        clock = Clock(self._model.device)
        groups, own = inputs.get(GROUPS), {name: value for name, value in inputs.items() if name != GROUPS}
        frame = None if policy is None else self._frame(clock, policy, groups)
        generate = self._original(clock) if frame is None else frame.generate
        self.memory.start()
        with clock.running():
            output = generate(**own, **self._settings)
        ids = output[0, inputs["input_ids"].shape[1] :].cpu()
        spent = dict(clock.milliseconds)
        decode = spent.pop("decode") / (len(ids) - 1) if len(ids) > 1 else None
        dropped = 0 if frame is None else frame.dropped
        return Answer(ids, spent["vision"], spent["selection"], spent["prefill"], decode, self.memory.peak(), dropped)

    def _original(self, clock: Clock) -> Callable[..., Tensor]:
        def generate(**arguments: Any) -> Tensor:
            with _noting(self._model, self._decoder, clock):
                output: Tensor = self._model.generate(**arguments)
            return output

        return generate

    def _frame(self, clock: Clock, policy: Policy, groups: Any) -> _TimedFrame:
        return _TimedFrame(self._compiled, Session(self._compiled.dop_tier, None, groups, policy=policy), clock)


@contextmanager
def _noting(model: Any, decoder: Any, clock: Clock) -> Iterator[None]:
    """Hooks on the untouched model that tell the clock; gone when the block ends, as if they had never been."""
    handles = [
        decoder.register_forward_pre_hook(lambda module, args: clock.enter_decoder()),
        model.register_forward_hook(lambda module, args, output: clock.leave_model()),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _TimedFrame(Frame):
    """A `generate` that tells the clock, and how many of the prompt's tokens the reducer dropped."""

    def __init__(self, compiled: Any, session: Session, clock: Clock):
        super().__init__(compiled.dop, compiled, session)
        self._clock = clock
        self.dropped = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        self._clock.leave_model()
        if (cache := cache_of(output)) is not None:
            self.dropped = cache.columns_seen - cache.slots_seen  # generated tokens are one slot each
        return output

    def run_decoder(self, call: Call, kwargs: dict[str, Any]) -> Any:
        self._clock.enter_decoder()
        return super().run_decoder(call, kwargs)


# --- token counts -----------------------------------------------------------------------------------------------------


class _CountedError(Exception):
    """Ends a call at its decoder, once its tokens are counted."""


class _CountingFrame(Frame):
    """A call that gets as far as the decoder."""

    def __init__(self, compiled: Any, groups: Any, mask: Tensor | None):
        full = Policy.full(next(iter(compiled.dop.tiers.values())).num_layers)
        super().__init__(compiled.dop, compiled, Session(compiled.dop_tier, None, groups, policy=full))
        self._mask = mask
        self.counts = (0, 0, 0)

    def run_decoder(self, call: Call, kwargs: dict[str, Any]) -> Any:
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            embeds = self.decoder.get_input_embeddings()(kwargs["input_ids"])
        self.counts = token_counts(call, embeds, embeds.shape[1], self._mask)
        raise _CountedError


@torch.no_grad()
def prompt_counts(compiled: Any, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
    """System, visual and text tokens of a prompt of one row, before reduction; runs the vision tower alone.

    Newlines inside an image, which no policy drops, count as text.
    """
    frame = _CountingFrame(compiled, inputs.get(GROUPS), inputs.get("attention_mask"))
    try:
        frame.forward(**{name: value for name, value in inputs.items() if name != GROUPS})
    except _CountedError:
        return frame.counts
    raise AssertionError("the model's forward does not call its decoder")
