"""One prompt's prefill, prepared once and run under any number of policies.

    replay = Replay(dop_compile(model, Policy.full(L), backend="eager"), inputs, depths=(0, 4, 8))
    replay.original                          # logits of the untouched decoder
    replay.logits(policy)                    # logits under a policy

The vision tower and the original decoder run once, when the replay is made. A policy that prunes nothing before some
depth, and no tokens, goes on from the residual stream that the original decoder had there; no cache is written.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dop_compile.drop_in.frame import CALL_ARGUMENTS, Frame, Session, presented_as
from dop_compile.drop_in.observer import Observer
from dop_compile.drop_in.wrapped_forward import check_unwrapped
from dop_compile.errors import UnsupportedUsageError
from dop_compile.hf.copies import copy_path, own_forward, shallow_copy
from dop_compile.hf.dimensions import DecoderDims
from dop_compile.hf.merging import merge_images
from dop_compile.hf.model_path import find_layers, placeholder_ids
from dop_compile.hf.spellings import CACHE, canonical, parameters, spelled
from dop_compile.policy.costs import prefill_flops
from dop_compile.policy.policy import Policy
from dop_compile.reports.executed import SampleTokens, resumed_flops
from dop_compile.runtime.call import Call
from dop_compile.runtime.decoder import run_decoder
from dop_compile.runtime.outer_masks import deferred
from dop_compile.runtime.token_kinds import token_counts
from dop_compile.tracing.side_inputs import embed_ids
from dop_compile.vision.prompt import vision_fields

__all__ = ["Replay"]


_OWN = (*CALL_ARGUMENTS, "use_cache", CACHE)


class Replay:
    """A prompt that can be run under many policies.

    Args:
        compiled: a compiled model; which policies it was compiled with does not matter, but what a reducer wants to
            know about the vision tower is noted for its default tier's reducer alone.
        inputs: what its `forward` takes for the prompt, `input_ids` among it; tokens behind `prompt_tokens` are
            teacher-forced output.
        depths: layers at whose input the residual stream is kept, to go on from; memory grows with their number. Those
            from which on layers read the keys and values of earlier ones are left out.
        prompt_tokens: length of the prompt; None: all of `input_ids`.
        rows: how many last rows of logits are wanted.

    Raises:
        UnsupportedUsageError, ValueError: as the compiled model's `forward`; no part of the model makes the logits of
            the decoder's output alone.
    """

    def __init__(
        self,
        compiled: Any,
        inputs: Mapping[str, Any],
        *,
        depths: Sequence[int] = (),
        prompt_tokens: int | None = None,
        rows: int = 1,
    ):
        if "input_ids" not in inputs:
            raise ValueError(f"inputs: expected input_ids among them, got {', '.join(inputs) or 'none'}")
        check_unwrapped(compiled.dop.original.model, "running a prompt under many policies")
        self._compiled = compiled
        self._rows = rows
        given = canonical(compiled.dop.model_class.forward, inputs)
        self._inputs = {name: value for name, value in given.items() if name not in _OWN}
        session = Session(compiled.dop_tier, inputs.get("visual_indices"), inputs.get("token_groups"))
        self._prompt = prompt_tokens or self._inputs["input_ids"].shape[1]
        session.streams.main.prompt_columns = self._prompt
        recorder = _Recorder([depth for depth in depths if compiled.dop.can_begin_at(depth)])
        frame = Frame(compiled.dop, compiled, session, recorder)
        head = _Head.of(frame)
        recorder.note_logits(head, frame)
        keep = {"logits_to_keep": rows} if "logits_to_keep" in _parameters(compiled) else {}
        with torch.no_grad():
            output = frame.forward(**self._inputs, **keep, use_cache=False)
        self.original: Tensor = output.logits[:, -rows:]
        """(batch, rows, vocabulary) logits of the untouched model."""
        recorder.check_logits(head, frame, output.logits)
        assert recorder.call is not None
        self._call = replace(recorder.call, rows=rows)
        self._decoder, self._arguments = frame.decoder, dict(recorder.arguments)
        ids = self._arguments.pop("input_ids", None)
        if self._arguments.get("inputs_embeds") is None:  # text-only models leave the embedding to their decoder
            with torch.no_grad():
                self._arguments["inputs_embeds"] = embed_ids(self._decoder, ids, self._arguments)
        self._streams = recorder.streams

    @property
    def counts(self) -> tuple[int, int, int]:
        """System, visual and text tokens of a batch of one, padding left out.

        Forced tokens are text, and so are the newlines inside an image, which no policy drops.
        """
        mask: Tensor | None = self._inputs.get("attention_mask")
        return token_counts(self._call, self._arguments["inputs_embeds"], self._prompt, mask)

    def first_layer(self, policy: Policy) -> int:
        """The layer at which a run of `policy` begins."""
        if policy.visual_tokens is not None or policy.salient_fraction is not None or policy.ranking is not None:
            return 0
        limit = min((operation.layer for operation in policy.pruned), default=policy.num_layers - 1)
        return max((depth for depth in self._streams if depth <= limit), default=0)

    @torch.no_grad()
    def logits(self, policy: Policy) -> Tensor:
        """(batch, rows, vocabulary) logits of the last rows under a policy."""
        first = self.first_layer(policy)
        call = replace(self._call, policy=policy, first_layer=first, stream=self._streams.get(first))
        output = run_decoder(self._compiled.dop, self._decoder, call, **self._arguments)
        hidden: Tensor = (output[0] if isinstance(output, tuple) else output.last_hidden_state)[:, -self._rows :]
        return self._head(hidden, type(output))

    @property
    def original_flops(self) -> int:
        """Decoder FLOPs of the original's prefill for one sample (DOP eq. 11)."""
        dims = DecoderDims.from_config(self._compiled.config)
        return prefill_flops(dims, Policy.full(dims.num_layers), *self.counts)

    def flops(self, policy: Policy) -> int:
        """Decoder FLOPs that `logits(policy)` computes for one sample of the batch."""
        system, visual, text = self.counts
        prompt = SampleTokens(system, visual, text, self._rows, use_cache=False)
        dims = DecoderDims.from_config(self._compiled.config)
        return resumed_flops(self._compiled.dop, policy, prompt, dims, self.first_layer(policy))

    def _head(self, hidden: Tensor, kind: type[Any]) -> Tensor:
        """What the model makes of its decoder's output."""
        session = Session(self._compiled.dop_tier)
        session.streams.main.prompt_columns = 0
        frame = Frame(self._compiled.dop, self._compiled, session, _Given(hidden, kind))
        head, placeholders = _Head.of(frame), placeholder_ids(frame.root.config)
        word = next(number for number in range(len(placeholders) + 1) if number not in placeholders)
        ids = torch.full(hidden.shape[:2], word, device=hidden.device)
        arguments = {"input_ids": ids, "use_cache": False}
        logits: Tensor = frame.run_part(head.module, head.forward, (), arguments).logits
        return logits


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


@dataclass(frozen=True)
class _Head:
    """The outermost part on a frame's path whose forward needs no more than `input_ids`.

    It is the model itself but for those that ask for pictures (BLIP-2), of which it is the language model inside.
    """

    module: Any
    forward: Callable[..., Any]

    @classmethod
    def of(cls, frame: Frame) -> _Head:
        module, forward = frame.root, frame.state.model_class.forward
        parts = [m for m in frame.chain[1:-1] if isinstance(m, PreTrainedModel) and m.can_generate()]
        for part in parts:
            if _needed(forward):
                module, forward = part, type(part).forward
        if _needed(forward):
            raise UnsupportedUsageError(
                f"{frame.state.model_class.__name__} cannot be run under many policies at the cost of their decoders "
                f"alone: its forward asks for {', '.join(_needed(frame.state.model_class.forward))}, and no part of it "
                "makes logits without; compile each policy as a tier and compare those"
            )
        return cls(module, forward)


def _needed(forward: Callable[..., Any]) -> list[str]:
    """Names of the arguments without a default, but for the prompt."""
    _, *parameters = inspect.signature(forward).parameters.values()
    named = (p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    return [p.name for p in named if p.default is p.empty and p.name != "input_ids"]


class _Recorder(Observer):
    """Runs the decoder as the original does, noting its arguments, residual streams and its head's logits."""

    def __init__(self, depths: Sequence[int]):
        self._logits: Tensor | None = None
        self.call: Call | None = None
        self.arguments: dict[str, Any] = {}
        self.streams: dict[int, Tensor] = {}
        self._depths = frozenset(depths) - {0}

    def vision_fields(self, policy: Policy) -> frozenset[str]:
        return vision_fields(policy)  # the policies that will be run may reduce tokens where this one does not

    def note_logits(self, head: _Head, frame: Frame) -> None:
        """Note what the head makes, where it is not the model itself."""
        if head.module is frame.root:
            return
        function = head.module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = function(*args, **kwargs)
            self._logits = output[0] if isinstance(output, tuple) else output.logits
            return output

        head.module.forward = presented_as(head.forward, forward)

    def check_logits(self, head: _Head, frame: Frame, logits: Tensor) -> None:
        """UnsupportedUsageError where the model's logits are not those that its head makes."""
        own_logits = self._logits
        if head.module is frame.root or (own_logits is not None and _equal(own_logits, logits)):
            return
        raise UnsupportedUsageError(
            f"{frame.state.model_class.__name__} changes the logits of its {type(head.module).__name__}, which alone "
            "goes on from the decoder's output; compile each policy as a tier and compare those"
        )

    def decoder(self, decoder: Any, call: Call, arguments: dict[str, Any], run: Callable[[], Any]) -> Any:
        if (merged := merge_images(decoder, arguments)) is not None:
            call.visual.append(merged)
        self.call, self.arguments = call, arguments
        plain = dict(arguments)
        if (masks := deferred(plain.get("attention_mask"))) is not None:
            plain["attention_mask"] = masks.original()
        function = type(decoder).forward
        return function(_noting(decoder, self._depths, self.streams), **spelled(function, plain))


def _equal(first: Tensor, second: Tensor) -> bool:
    """Bit for bit, wherever they are; NaN is NaN."""
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    return torch.allclose(first.to(second.device), second, rtol=0, atol=0, equal_nan=True)


class _Given(Observer):
    """Gives a decoder's output, whatever the decoder is called with."""

    def __init__(self, hidden: Tensor, kind: type[Any]):
        self._result = (hidden, None) if issubclass(kind, tuple) else kind(last_hidden_state=hidden)

    def decoder(self, decoder: Any, call: Call, arguments: dict[str, Any], run: Callable[[], Any]) -> Any:
        return self._result


def _noting(decoder: Any, depths: frozenset[int], streams: dict[int, Tensor]) -> Any:
    """A copy of a decoder that keeps the residual stream which enters some layers.

    The layers are copies too, so that nothing is hooked that another call runs.
    """
    path, layers = find_layers(decoder)
    copies = copy_path(decoder, path)

    def note(depth: int) -> None:
        layer = layers[depth]
        copy = copies[-1]._modules[str(depth)] = shallow_copy(layer, own_children=False)
        plain = own_forward(copy)
        _, stream, *_ = parameters(type(layer).forward)

        def forward(*args: Any, **kwargs: Any) -> Any:
            streams[depth] = args[0] if args else kwargs[stream]
            return plain(*args, **kwargs)

        copy.forward = presented_as(type(layer).forward, forward)

    for depth in depths:
        note(depth)
    return copies[0]
