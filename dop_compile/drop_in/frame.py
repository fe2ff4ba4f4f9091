"""One call of a compiled model: private copies of the modules on the path to the decoder.

What Hugging Face's code stores on modules during a call - rope deltas, for one - thus belongs to that call. The state
of a conversation is kept in the cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from dop_compile.drop_in.model_path import copy_path, placeholder_ids
from dop_compile.drop_in.session import CALL_ARGUMENTS, Session, presented_as
from dop_compile.errors import UnsupportedModelError, UnsupportedUsageError
from dop_compile.policy import Policy
from dop_compile.runtime.cache import PrunedCache
from dop_compile.runtime.decoder import run_decoder
from dop_compile.runtime.outer_masks import builds_masks, deferring_forward
from dop_compile.runtime.slots import Call
from dop_compile.vision.features import TokenFeatures
from dop_compile.vision.prompt import vision_fields, watch_vision

__all__ = ["CALL_ARGUMENTS", "Frame", "Session", "presented_as"]

CONVERSATION_ATTRIBUTES = ("rope_deltas",)
"""Attributes that Hugging Face's outer models keep between calls on the module; here they live in the cache."""

NEWLINE_EMBEDDINGS = ("image_newline",)
"""Embeddings that a model inserts inside image placeholders: visual, never dropped, not counted."""


class Frame:
    """Private copies of the path modules for one session."""

    def __init__(self, state: Any, root: nn.Module, session: Session):
        self.state = state
        self.session = session
        state.original.update()
        state.follow_changes()
        self.chain = copy_path(root, state.decoder_path)
        for module in self.chain:
            vars(module).pop("forward", None)
        self.chain[0].training = state.base.training
        self.root, self.decoder = self.chain[0], self.chain[-1]
        self._restored = False
        self._running = False
        self._encoded: list[TokenFeatures] = []  # images and videos that `generate` encodes before the prompt
        for module in self.chain[:-1]:
            if module is not self.root and builds_masks(module):
                module.forward = deferring_forward(module)
        self.root.forward = presented_as(state.model_class.forward, self.forward)

    # --- one forward call -----------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self.root, self.state.original.forward, args, kwargs)

    def _run(self, module: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of `function`, the forward of the model or of a part of it that generates by itself."""
        self._running = True
        try:
            return self._run_once(module, function, args, kwargs)
        finally:
            self._running = False

    def _run_once(self, module: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        arguments = inspect.signature(function).bind_partial(module, *args, **kwargs).arguments
        named = {**arguments, **arguments.get("kwargs", {})}
        cache = named.get("past_key_values")
        self.restore(cache)
        call = self._call(named)
        if call.prompt_tokens:
            self._watch_vision(call.vision)
        if self.session.visual is not None and call.prompt_tokens:
            call.visual.append(_per_row(self.session.visual, call.batch))
        self.decoder.forward = self._decoder_forward(call)
        for part in self.chain[:-1]:
            if hasattr(type(part), "get_placeholder_mask"):
                part.get_placeholder_mask = self._note_placeholders(call, type(part), part)
        output = function(module, *args, **kwargs)
        if not call.done:
            raise UnsupportedModelError(
                f"the forward of {type(self.root).__name__} does not call {self.state.decoder_path}; what it returns "
                "was not pruned"
            )
        if call.prompt_tokens and not call.visual and call.token_groups is None and _has_images(named):
            raise UnsupportedModelError(
                f"{type(self.root).__name__} does not say which tokens are those of the images; pass token_groups"
            )
        for value in output if isinstance(output, tuple) else (cache, getattr(output, "past_key_values", None)):
            if isinstance(value, PrunedCache):
                value.conversation = self._conversation(call.batch)
        return output

    def _decoder_forward(self, call: Call) -> Callable[..., Any]:
        signature = inspect.signature(type(self.decoder).forward)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if args:  # some outer models pass their decoder's arguments by position
                positional = signature.bind_partial(self.decoder, *args).arguments
                kwargs = {**dict(list(positional.items())[1:]), **kwargs}
            call.done = True
            return self.run_decoder(call, kwargs)

        return forward

    def _watch_vision(self, noted: list[TokenFeatures]) -> None:
        """Note in a list what the vision tower returns, and what the session's reducer wants to know about it."""
        wanted = self.vision_fields(self.session.policy or self.state.tiers[self.session.tier])
        if wanted is not None:
            watch_vision(self.chain, self.state.decoder_path, wanted, noted.append)

    def vision_fields(self, policy: Policy) -> frozenset[str] | None:
        """What the policy's reducer wants to know about the vision tower in this session; None if it is not asked."""
        reduces = policy.visual_tokens is not None or policy.salient_fraction is not None
        return vision_fields(policy) if reduces else None

    def run_decoder(self, call: Call, kwargs: dict[str, Any]) -> Any:
        """The decoder's forward in this session, with its arguments by name."""
        return run_decoder(self.state, self.decoder, call, **kwargs)

    def _call(self, named: dict[str, Any]) -> Call:
        session = self.session
        rows = named.get("logits_to_keep", 0)
        cache = named.get("past_key_values")
        tokens = named.get("inputs_embeds") if named.get("input_ids") is None else named["input_ids"]
        past = cache.get_seq_length() if cache is not None else 0
        length = 0 if tokens is None else tokens.shape[1]
        if session.prompt_columns is None:
            prompt = 0 if past and length == 1 else length
        else:  # without a cache, and with looked-up candidates, one call holds both prompt and generated tokens
            prompt = min(max(session.prompt_columns - past, 0), length)
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
            groups = self._token_groups(None if ids is None else ids[:, :prompt], tokens[:, :prompt], past)
            call.token_groups = None if groups is None else F.pad(groups, (0, length - prompt))
            if not any(hasattr(type(module), "get_placeholder_mask") for module in self.chain):
                call.visual.extend(self._placeholders_by_id(named))
        for module in self.chain[:-1]:
            for name in NEWLINE_EMBEDDINGS:
                newline = getattr(module, name, None)
                if isinstance(newline, Tensor):
                    call.newline = newline.detach()
        return call

    def _token_groups(self, input_ids: Tensor | None, tokens: Tensor, past: int) -> Tensor | None:
        groups = self.session.token_groups
        if groups is None:
            groups = self.state.token_groups
        if callable(groups):
            if input_ids is None:
                raise UnsupportedUsageError("a token_groups function needs input_ids; pass a tensor with inputs_embeds")
            groups = groups(input_ids)
        if groups is None:
            return None
        groups = torch.as_tensor(groups, device=tokens.device)
        batch, length = tokens.shape[:2]
        if groups.dim() != 2:
            raise ValueError(f"token_groups must be (batch, tokens), got {tuple(groups.shape)}")
        if groups.shape[1] in (past + length, self.session.prompt_columns):
            groups = groups[:, past : past + length]
        if groups.shape[0] != batch and batch % groups.shape[0] == 0:
            groups = groups.repeat_interleave(batch // groups.shape[0], dim=0)
        if groups.shape != (batch, length):
            raise ValueError(f"token_groups is {tuple(groups.shape)}; the prompt is {(batch, length)}")
        if not bool(((groups >= 0) & (groups <= 2)).all()):
            raise ValueError("token_groups: values are 0 (text), 1 (visual) and 2 (system)")
        return groups

    def _placeholders_by_id(self, named: dict[str, Any]) -> list[Tensor]:
        """Placeholder positions by their ids, where images or videos are handed in."""
        if not _has_images(named):
            return []
        if named.get("input_ids") is None:
            raise UnsupportedUsageError(
                f"{type(self.root).__name__} cannot tell which positions of inputs_embeds are visual; pass input_ids, "
                "or token_groups"
            )
        return [named["input_ids"] == number for number in placeholder_ids(self.root.config)]

    def _note_placeholders(self, call: Call, kind: type, module: nn.Module) -> Callable[..., Any]:
        original = kind.get_placeholder_mask  # type: ignore[attr-defined]

        def get_placeholder_mask(*args: Any, **kwargs: Any) -> Any:
            masks = original(module, *args, **kwargs)
            call.visual.extend(m for m in (masks if isinstance(masks, tuple) else (masks,)) if isinstance(m, Tensor))
            return masks

        return get_placeholder_mask

    # --- conversation state ---------------------------------------------------------------------------------------

    def restore(self, cache: Any) -> None:
        """Begin with the state of the conversation that the cache belongs to, or with none."""
        if self._restored:
            return
        self._restored = True
        known = cache.conversation if isinstance(cache, PrunedCache) else {}
        for number, module in enumerate(self.chain):
            for name in CONVERSATION_ATTRIBUTES:
                if name in vars(module):
                    setattr(module, name, known.get(f"{number}.{name}"))

    def _conversation(self, batch: int) -> dict[str, Any]:
        def per_row(value: Any) -> Any:  # beams repeat the rows after some models computed this for the prompts
            if isinstance(value, Tensor) and value.dim() and batch % value.shape[0] == 0:
                return value.repeat_interleave(batch // value.shape[0], dim=0)
            return value

        return {
            f"{number}.{name}": per_row(vars(module)[name])
            for number, module in enumerate(self.chain)
            for name in CONVERSATION_ATTRIBUTES
            if vars(module).get(name) is not None
        }

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
        self.restore(kwargs.get("past_key_values"))
        # The mask covers the whole conversation also where only the new tokens are passed
        given = (kwargs.get(name) for name in ("attention_mask", "inputs_embeds", "input_ids", "inputs"))
        prompt = next((value for value in (*given, *args[:1]) if isinstance(value, Tensor)), None)
        self.session.prompt_columns = 1 if prompt is None else prompt.shape[1]
        self._watch_vision(self._encoded)
        self._follow_inner_generate(args, kwargs)
        return self.state.model_class.generate(self.root, *args, **kwargs)

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
        self.session.prompt_columns = input_ids.shape[1]
        placeholders = torch.tensor(placeholder_ids(self.root.config), device=input_ids.device)
        self.session.visual = torch.isin(input_ids, placeholders)

    def _inner_forward(self, module: Any) -> Callable[..., Any]:
        function = type(module).forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._running:  # the model's own forward calls its part
                return function(module, *args, **kwargs)
            return self._run(module, function, args, kwargs)

        return presented_as(function, forward)


def _has_images(named: dict[str, Any]) -> bool:
    """Whether a call is given images or videos: pixels, or what a vision tower made of them."""
    encoded = named.get("mm_encoder_outputs") or {}
    pixels = (value for name, value in named.items() if "pixel_values" in name)
    return any(value is not None for value in (*pixels, *encoded.values()))


def _per_row(values: Tensor, batch: int) -> Tensor:
    """The values of each prompt for the rows that beams or returned sequences repeat it in."""
    return values.repeat_interleave(batch // values.shape[0], dim=0)
