"""One question asked of the untouched model, or of a compiled one under a policy, and what the answer took."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dop_compile.drop_in.frame import Frame, Session, presented_as
from dop_compile.drop_in.observer import Observer
from dop_compile.evaluation.clock import Clock
from dop_compile.evaluation.memory import PeakMemory
from dop_compile.hf.copies import copy_path, own_forward, rebind
from dop_compile.hf.model_path import decoder_path, path_modules
from dop_compile.hf.spellings import cache_of
from dop_compile.policy.policy import Policy
from dop_compile.runtime.cache import PrunedCache
from dop_compile.runtime.call import Call
from dop_compile.runtime.token_kinds import token_counts

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
        self.memory = PeakMemory(model.device)

    @torch.no_grad()
    def ask(self, inputs: Mapping[str, Any], policy: Policy | None) -> Answer:
        """The answer under a policy; of the untouched model if None. `inputs` are of one row."""
        clock = Clock(self._model.device)
        groups, own = inputs.get(GROUPS), {name: value for name, value in inputs.items() if name != GROUPS}
        watch = _Watch(clock)
        if policy is None:
            generate: Callable[..., Any] = _watched(self._model, watch).generate
        else:
            session = Session(self._compiled.dop_tier, None, groups, policy=policy)
            generate = Frame(self._compiled.dop, self._compiled, session, watch).generate
        self.memory.start()
        with clock.running():
            output = generate(**own, **self._settings)
        ids = output[0, inputs["input_ids"].shape[1] :].cpu()
        spent = dict(clock.milliseconds)
        decode = spent.pop("decode") / (len(ids) - 1) if len(ids) > 1 else None
        peak = self.memory.peak()
        return Answer(ids, spent["vision"], spent["selection"], spent["prefill"], decode, peak, watch.dropped)


class _Watch(Observer):
    """Tells the clock, and how many of the prompt's tokens the reducer dropped."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self.dropped = 0

    def decoder(self, decoder: Any, call: Call, arguments: dict[str, Any], run: Callable[[], Any]) -> Any:
        self.entered()
        return run()

    def entered(self) -> None:
        self._clock.enter_decoder()

    def returned(self, output: Any) -> None:
        self._clock.leave_model()
        if isinstance(cache := cache_of(output), PrunedCache):
            self.dropped = cache.columns_seen - cache.slots_seen  # generated tokens are one slot each


def _watched(model: Any, watch: _Watch) -> Any:
    """A copy of the untouched model, to be called once, that tells when its decoder is entered and its forward left."""
    path = decoder_path(model)
    copies = copy_path(model, path)
    originals = [module for _, module in path_modules(model, path)]
    stands_for = {id(original): copy for original, copy in zip(originals, copies, strict=True)}
    for copy in copies:
        rebind(copy, stands_for)
    root, decoder = copies[0], copies[-1]
    run_model, run_decoder = own_forward(root), own_forward(decoder)

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = run_model(*args, **kwargs)
        watch.returned(output)
        return output

    def decoder_forward(*args: Any, **kwargs: Any) -> Any:
        watch.entered()
        return run_decoder(*args, **kwargs)

    root.forward = presented_as(type(model).forward, forward)
    decoder.forward = presented_as(type(decoder).forward, decoder_forward)
    return root


# --- token counts -----------------------------------------------------------------------------------------------------


class _CountedError(Exception):
    """Ends a call at its decoder, once its tokens are counted."""


class _Count(Observer):
    """Lets a call get as far as the decoder."""

    def __init__(self, mask: Tensor | None):
        self._mask = mask
        self.counts = (0, 0, 0)

    def decoder(self, decoder: Any, call: Call, arguments: dict[str, Any], run: Callable[[], Any]) -> Any:
        embeds = arguments.get("inputs_embeds")
        if embeds is None:
            embeds = decoder.get_input_embeddings()(arguments["input_ids"])
        self.counts = token_counts(call, embeds, embeds.shape[1], self._mask)
        raise _CountedError


@torch.no_grad()
def prompt_counts(compiled: Any, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
    """System, visual and text tokens of a prompt of one row, before reduction; runs the vision tower alone.

    Newlines inside an image, which no policy drops, count as text.
    """
    full = Policy.full(next(iter(compiled.dop.tiers.values())).num_layers)
    session = Session(compiled.dop_tier, None, inputs.get(GROUPS), policy=full)
    count = _Count(inputs.get("attention_mask"))
    try:
        own = {name: value for name, value in inputs.items() if name != GROUPS}
        Frame(compiled.dop, compiled, session, count).forward(**own)
    except _CountedError:
        return count.counts
    raise AssertionError("the model's forward does not call its decoder")
