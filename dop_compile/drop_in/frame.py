"""One call of a compiled model: private copies of the modules on the path to the decoder.

What Hugging Face's code stores on modules during a call - rope deltas, for one - thus belongs to that call. The state
of a conversation is kept in the cache.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from dop_compile.drop_in.conversation import conversation, set_conversation
from dop_compile.drop_in.observer import Observer
from dop_compile.drop_in.session import CALL_ARGUMENTS, Session, presented_as
from dop_compile.drop_in.streams import Stream
from dop_compile.drop_in.visual_tokens import has_images, placeholders_by_id, token_groups
from dop_compile.errors import UnsupportedModelError, UnsupportedUsageError
from dop_compile.hf.copies import copy_path, own, rebind, rebound
from dop_compile.hf.model_path import placeholder_ids
from dop_compile.hf.names import NEWLINE_EMBEDDINGS
from dop_compile.hf.spellings import CACHE, cache_of, canonical, signature, spelled
from dop_compile.runtime.cache import PrunedCache
from dop_compile.runtime.call import Call
from dop_compile.runtime.decoder import run_decoder
from dop_compile.runtime.outer_masks import builds_masks, deferring_forward
from dop_compile.vision.features import TokenFeatures
from dop_compile.vision.prompt import watch_vision

__all__ = ["CALL_ARGUMENTS", "Frame", "Session", "presented_as"]

GENERATE_ARGUMENTS = frozenset(
    {*inspect.signature(GenerationMixin.generate).parameters, "tokenizer", "assistant_tokenizer", "inputs_tensor"}
) - {"self", "inputs", "kwargs"}
"""What `generate` itself reads; some of it transformers also passes on to `forward`, which does nothing with it."""

GENERATE_REPLACED = (
    "the generate of {} was replaced on the instance by something that does not lead to the model it stands on, so "
    "that it cannot be made to run the compiled one; put it back, and pass what shall run as custom_generate="
)


class Frame:
    """Private copies of the path modules for one session, and what watches its calls."""

    def __init__(self, state: Any, root: nn.Module, session: Session, observer: Observer | None = None):
        self.state = state
        self.observer = observer or Observer()
        self.session = session
        state.follow(root)
        self.chain = copy_path(root, state.decoder_path)
        for module in self.chain:
            vars(module).pop("forward", None)
        stands_for = state.stands_for(self.chain)
        for module in self.chain:
            rebind(module, stands_for)
        self.chain[0].training = state.base.training
        self.root, self.decoder = self.chain[0], self.chain[-1]
        self._generate = self._own_generate(stands_for)
        self._view = root
        self._finders = [
            (part, part.get_placeholder_mask) for part in self.chain[:-1] if hasattr(part, "get_placeholder_mask")
        ]
        self._around: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
        self._restored = False
        self._running = False
        self._encoded: list[TokenFeatures] = []  # images and videos that `generate` encodes before the prompt
        for module in self.chain[:-1]:
            if module is not self.root and builds_masks(module):
                module.forward = deferring_forward(module)
        self.root.forward = presented_as(state.model_class.forward, self.forward)
        self.root.generate = presented_as(state.model_class.generate, self._generate_inside)

    def _own_generate(self, stands_for: dict[int, nn.Module]) -> Callable[..., Any]:
        """The class's `generate`, or the one that stands on the original (transformers puts custom ones there)."""
        replaced = vars(self.state.original.model).get("generate")
        if replaced is None:
            return functools.partial(self.state.model_class.generate, self.root)
        follows: Callable[..., Any] = rebound(replaced, stands_for)
        if follows is replaced:
            raise UnsupportedUsageError(GENERATE_REPLACED.format(type(self.root).__name__))
        return follows

    def run_within(self, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Run each forward of this frame, and of any `generate` inside, within what others have put around it."""
        self._around = around
        self.root.forward = around(self.root.forward)

    # --- one forward call -----------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._check_tier(kwargs)
        output = self.run_part(self.root, self.state.original.forward, args, kwargs)
        self.observer.returned(output)
        return output

    def _check_tier(self, kwargs: dict[str, Any]) -> None:
        """Loops of the caller's own may name what holds for the whole `generate` again, and nothing else."""
        for name in CALL_ARGUMENTS:
            value, known = kwargs.pop(name, None), getattr(self.session, name)
            if value is not None and value is not known and (name != "tier" or value != known):
                raise UnsupportedUsageError(
                    f"{name} was given to a call inside generate; it holds for the whole generate: pass it to that"
                )

    def run_part(self, module: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of `function`, the forward of the model or of a part of it that generates by itself."""
        self._running = True
        try:
            return self._run_once(module, function, args, kwargs)
        finally:
            self._running = False

    def _run_once(self, module: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        kwargs = {n: value for n, value in spelled(function, kwargs).items() if n not in GENERATE_ARGUMENTS}
        arguments = signature(function).bind_partial(module, *args, **kwargs).arguments
        named = canonical(function, {**arguments, **arguments.get("kwargs", {})})
        cache = named.get(CACHE)
        self.restore(cache)
        stream = self._stream(named)
        with self._as_stream(stream, cache):
            call = self._call(named, stream)
            if call.prompt_tokens:
                self._watch_vision(call.vision)
            if self.session.visual is not None and call.prompt_tokens and stream.main:
                call.visual.append(_per_row(self.session.visual, call.batch))
            self.decoder.forward = self._decoder_forward(call)
            for part, finder in self._finders:
                part.get_placeholder_mask = own(_noting_placeholders(call, finder))
            output = function(module, *args, **kwargs)
            if not call.done:
                raise UnsupportedModelError(
                    f"the forward of {type(self.root).__name__} does not call {self.state.decoder_path}; what it "
                    "returns was not pruned"
                )
            if call.prompt_tokens and not call.visual and call.token_groups is None and has_images(named):
                raise UnsupportedModelError(
                    f"{type(self.root).__name__} does not say which tokens are those of the images; pass token_groups"
                )
            for value in output if isinstance(output, tuple) else (cache, cache_of(output)):
                if isinstance(value, PrunedCache):
                    value.conversation = conversation(self.chain, call.batch)
                    self.session.streams.note_cache(value, stream)
        return output

    def _stream(self, named: dict[str, Any]) -> Stream:
        ids, cache = named.get("input_ids"), named.get(CACHE)
        tokens = named.get("inputs_embeds") if ids is None else ids
        past = 0 if cache is None else cache.get_seq_length()
        return self.session.streams.of_call(cache, ids, past, 0 if tokens is None else tokens.shape[1])

    def _decoder_forward(self, call: Call) -> Callable[..., Any]:
        function = type(self.decoder).forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if args:  # some outer models pass their decoder's arguments by position
                positional = signature(function).bind_partial(self.decoder, *args).arguments
                kwargs = {**dict(list(positional.items())[1:]), **kwargs}
            call.done = True
            arguments = canonical(function, kwargs)
            run = functools.partial(run_decoder, self.state, self.decoder, call, **arguments)
            return self.observer.decoder(self.decoder, call, arguments, run)

        return forward

    def _watch_vision(self, noted: list[TokenFeatures]) -> None:
        """Note in a list what the vision tower returns, and what the session's reducer wants to know about it."""
        wanted = self.observer.vision_fields(self.session.policy or self.state.tiers[self.session.tier])
        if wanted is not None:
            watch_vision(self.chain, self.state.decoder_path, wanted, noted.append)

    def _call(self, named: dict[str, Any], stream: Stream) -> Call:
        session = self.session
        rows = named.get("logits_to_keep", 0)
        cache = named.get(CACHE)
        tokens = named.get("inputs_embeds") if named.get("input_ids") is None else named["input_ids"]
        past = cache.get_seq_length() if cache is not None else 0
        length = 0 if tokens is None else tokens.shape[1]
        prompt = stream.prompt_tokens(past, length)
        call = Call(
            tier=session.tier,
            policy=session.policy or self.state.tiers[session.tier],
            rows=rows if isinstance(rows, int) and named.get("labels") is None else 0,
            prompt_tokens=prompt,
            batch=1 if tokens is None else tokens.shape[0],
            given=session.visual_indices,
            vision=list(self._encoded),
            input_ids=named.get("input_ids"),
            model=self.state.model_class.__name__,
        )
        if prompt and tokens is not None:
            ids = named.get("input_ids")
            groups = token_groups(
                self._said_groups(stream), None if ids is None else ids[:, :prompt], tokens[:, :prompt], past, stream
            )
            call.token_groups = None if groups is None else F.pad(groups, (0, length - prompt))
            if not any(hasattr(module, "get_placeholder_mask") for module in self.chain):
                call.visual.extend(placeholders_by_id(self.root, named))
        for module in self.chain[:-1]:
            for name in NEWLINE_EMBEDDINGS:
                newline = getattr(module, name, None)
                if isinstance(newline, Tensor):
                    call.newline = newline.detach()
        return call

    def _said_groups(self, stream: Stream) -> Any:
        """What the caller says of the tokens; a tensor tells of the caller's own prompt alone."""
        groups = self.session.token_groups
        if groups is None:
            groups = self.state.token_groups
        return groups if stream.main or callable(groups) else None

    # --- conversation state ---------------------------------------------------------------------------------------

    def restore(self, cache: Any) -> None:
        """Begin with the state of the conversation that the cache belongs to, or with none."""
        if not self._restored:
            self._restored = True
            set_conversation(self.chain, cache.conversation if isinstance(cache, PrunedCache) else {})

    @contextmanager
    def _as_stream(self, stream: Stream, cache: Any) -> Iterator[None]:
        """While the block runs, the modules hold what belongs to the stream's own conversation."""
        if stream.main:
            yield
            return
        before = conversation(self.chain, 1)
        set_conversation(self.chain, cache.conversation if isinstance(cache, PrunedCache) else {})
        try:
            yield
        finally:
            set_conversation(self.chain, before)

    # --- generate -------------------------------------------------------------------------------------------------

    @staticmethod
    def _check_generation(settings: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("prefill_chunk_size", getattr(settings, "prefill_chunk_size", None)):
            raise UnsupportedUsageError(
                "prefill_chunk_size is not supported by a compiled model: which tokens are pruned is decided for the "
                "whole prompt; leave it unset"
            )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self._check_generation(kwargs.get("generation_config") or self.root.generation_config, kwargs)
        kwargs = spelled(self.state.model_class.forward, kwargs)  # what `generate` hands to the model
        self.restore(canonical(self.state.model_class.forward, kwargs).get(CACHE))
        # The mask covers the whole conversation also where only the new tokens are passed
        given = (kwargs.get(name) for name in ("attention_mask", "inputs_embeds", "input_ids", "inputs"))
        prompt = next((value for value in (*given, *args[:1]) if isinstance(value, Tensor)), None)
        self.session.streams.begin_generate(1 if prompt is None else prompt.shape[1])
        for part in self.chain[:-1]:
            if isinstance(part, PreTrainedModel) and part.can_generate():
                vars(part)["_prepare_cache_for_generation"] = own(self._noting_cache(part))
        self._watch_vision(self._encoded)
        self._follow_inner_generate(args, kwargs)
        return self._generate(*args, **kwargs)

    def _generate_inside(self, *args: Any, **kwargs: Any) -> Any:
        """A `generate` called while this one runs: by a custom loop, or to heal tokens."""
        inner = self.session.inner({name: kwargs.pop(name, None) for name in CALL_ARGUMENTS})
        self.state.check_tier(inner.tier)
        frame = Frame(self.state, self._view, inner, self.observer)
        frame._generate = functools.partial(self.state.model_class.generate, frame.root)
        if self._around is not None:
            frame.run_within(self._around)
        return frame.generate(*args, **kwargs)

    def _noting_cache(self, part: Any) -> Callable[..., Any]:
        """Let the streams know the cache that `generate` makes, or takes, for its prompt."""
        prepare = part._prepare_cache_for_generation

        def prepare_cache(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            result = prepare(generation_config, model_kwargs, *args, **kwargs)
            for value in model_kwargs.values():
                self.session.streams.begin_cache(value)
            return result

        return prepare_cache

    def _follow_inner_generate(self, args: Any, kwargs: Any) -> None:
        """Some models (BLIP-2) merge the images in their `generate` and hand the rest to that of a part of theirs."""
        generate = self.state.model_class.generate
        parts = [m for m in self.chain[1:-1] if isinstance(m, PreTrainedModel) and m.can_generate()]
        if generate is GenerationMixin.generate or not parts:
            return
        for part in parts:
            part.forward = self._inner_forward(part)
        input_ids = inspect.signature(generate).bind_partial(self.root, *args, **kwargs).arguments.get("input_ids")
        if input_ids is None:
            raise UnsupportedUsageError(
                f"{type(self.root).__name__} cannot tell which tokens are visual; pass input_ids with its placeholders"
            )
        self.session.streams.main.prompt_columns = input_ids.shape[1]
        placeholders = torch.tensor(placeholder_ids(self.root.config), device=input_ids.device)
        self.session.visual = torch.isin(input_ids, placeholders)

    def _inner_forward(self, module: Any) -> Callable[..., Any]:
        function = type(module).forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._running:  # the model's own forward calls its part
                return function(module, *args, **kwargs)
            return self.run_part(module, function, args, kwargs)

        return presented_as(function, forward)


def _noting_placeholders(call: Call, finder: Callable[..., Any]) -> Callable[..., Any]:
    def get_placeholder_mask(*args: Any, **kwargs: Any) -> Any:
        masks = finder(*args, **kwargs)
        call.visual.extend(m for m in (masks if isinstance(masks, tuple) else (masks,)) if isinstance(m, Tensor))
        return masks

    return get_placeholder_mask


def _per_row(values: Tensor, batch: int) -> Tensor:
    """The values of each prompt for the rows that beams or returned sequences repeat it in."""
    return values.repeat_interleave(batch // values.shape[0], dim=0)
