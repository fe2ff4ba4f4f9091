"""One sample, prepared once and compared under any number of policies."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dop_compile.drop_in.model import generate_under
from dop_compile.policy.costs import prefill_flops
from dop_compile.policy.policy import Policy
from dop_compile.reducers import ResizeReducer
from dop_compile.replay import Replay
from dop_compile.search.metrics import METRICS, is_right

__all__ = ["ANSWERS", "TASK", "SampleMeter", "model_inputs", "resized", "resizing", "sample_digest"]

ANSWERS = "answers"
"""Where a sample keeps its right answers, beside the model's inputs."""
TASK = "task"
"""Where it may keep the name of its task."""

Resize = Callable[[int], Mapping[str, Any]]


def resizing(samples: Sequence[Any], number: int) -> Resize | None:
    """What makes a sample again with at most so many visual tokens, if the samples can do it."""
    method = getattr(samples, "resized", None)
    return None if method is None else functools.partial(method, number)


def resized(sample: Mapping[str, Any], policy: Policy, resize: Resize | None) -> Mapping[str, Any]:
    """What a policy is run on: the sample, or the same with smaller pictures.

    Raises:
        TypeError: the policy's reducer is `resize`, and nothing can do it.
    """
    if policy.reducer != ResizeReducer.name or policy.visual_tokens is None:
        return sample
    if resize is None:
        raise TypeError(
            "samples: the reducer 'resize' makes pictures smaller before the model sees them, so that samples need a "
            "method resized(number, visual_tokens), as dop_compile.search.samples.Samples has"
        )
    return resize(policy.visual_tokens)


def model_inputs(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample without answers and task.

    Raises:
        ValueError: it is not of one row.
    """
    inputs = {name: value for name, value in sample.items() if name not in (ANSWERS, TASK)}
    if "input_ids" not in inputs or inputs["input_ids"].shape[0] != 1:
        raise ValueError("expected what the model's forward takes for one prompt: input_ids (1, tokens)")
    return inputs


class SampleMeter:
    """One sample prepared for comparisons: how far the model under a policy is from the original on it.

    Args:
        compiled: a compiled model.
        sample: what the model's `forward` takes; `answers` (a sequence of strings) where the metric needs them.
        metric: a name in `METRICS`.
        depths: where depth-wise policies may go on from.
        tokens: for "forced_kl", how many of the original's tokens are compared.
        decode: token ids to text, for "accuracy_drop".
        resize: gives the sample with at most so many visual tokens, from smaller pictures; for policies whose reducer
            is `resize`.

    Raises:
        ValueError: the metric needs answers, and the sample has none.
    """

    def __init__(
        self,
        compiled: Any,
        sample: Mapping[str, Any],
        metric: str = "top_k_kl",
        *,
        depths: Sequence[int] = (),
        tokens: int = 4,
        decode: Callable[[Tensor], str] | None = None,
        resize: Resize | None = None,
    ):
        self._metric = METRICS[metric]
        self._compiled = compiled
        self._answers = sample.get(ANSWERS)
        self._inputs = model_inputs(sample)
        self._decode = decode
        if isinstance(self._answers, str):
            raise TypeError(f"answers: expected a list of strings, got {self._answers!r}")
        if self._metric.compare is None and (not self._answers or decode is None):
            raise ValueError("accuracy_drop: expected samples with answers, and decode (token ids to text)")
        self._forced: Tensor | None = None
        if self._metric.forced and tokens > 1:
            self._forced = _greedy(compiled, self._inputs, tokens - 1)
        self._forced_tokens = 0 if self._forced is None else tokens - 1
        self.replay = self._prepare(self._inputs, depths)
        self._right: bool | None = None
        self._resize = resize
        self._resized: tuple[int, Mapping[str, Any], Replay] | None = None

    def _prepare(self, inputs: Mapping[str, Any], depths: Sequence[int] = ()) -> Replay:
        columns = inputs["input_ids"].shape[1]
        longer = inputs if self._forced is None else _with_output(inputs, self._forced)
        rows = self._forced_tokens + 1
        return Replay(self._compiled, longer, depths=depths, prompt_tokens=columns, rows=rows)

    def _under(self, policy: Policy) -> tuple[Mapping[str, Any], Replay]:
        """The inputs that a policy is run on, and their prefill: those of smaller pictures where it resizes them."""
        count = policy.visual_tokens
        if policy.reducer != ResizeReducer.name or count is None or count >= self.counts[1]:
            return self._inputs, self.replay
        if self._resized is None or self._resized[0] != count:
            inputs = model_inputs(resized(self._inputs, policy, self._resize))
            self._resized = count, inputs, self._prepare(inputs)
        return self._resized[1:]

    @property
    def counts(self) -> tuple[int, int, int]:
        """System, visual and text tokens of the prompt, before reduction."""
        system, visual, text = self.replay.counts
        return system, visual, text - self._forced_tokens

    def flops(self, policy: Policy) -> int:
        """Decoder FLOPs of the run that `divergence` compares; of generated answers those of the prompt alone."""
        if self._metric.compare is None:
            return prefill_flops(self._compiled.config, policy, *self.counts)
        return self._under(policy)[1].flops(policy)

    def divergence(self, policy: Policy) -> float:
        """Of the model under `policy` from the original."""
        if self._metric.compare is not None:
            rows = zip(self.replay.original, self._under(policy)[1].logits(policy), strict=True)
            return float(np.mean([self._metric.compare(original, pruned) for original, pruned in rows]))
        if self._right is None:
            self._right = self._is_right(Policy.full(policy.num_layers))
        return float(self._right) - float(self._is_right(policy))

    def _is_right(self, policy: Policy) -> bool:
        assert self._decode is not None
        assert self._answers is not None
        inputs, _ = self._under(policy)
        output = generate_under(self._compiled, policy, **inputs, do_sample=False)
        return is_right(self._decode(output[0, inputs["input_ids"].shape[1] :]), self._answers)


def _greedy(compiled: Any, inputs: Mapping[str, Any], count: int) -> Tensor:
    """(1, count) the original's first greedy tokens."""
    full = Policy.full(next(iter(compiled.dop.tiers.values())).num_layers)
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    ids: Tensor = generate_under(compiled, full, **inputs, **settings)
    return ids[:, inputs["input_ids"].shape[1] :]


def _with_output(inputs: Mapping[str, Any], output: Tensor) -> dict[str, Any]:
    """The inputs with output tokens behind the prompt."""
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], output], dim=1)}
    for name, value in inputs.items():
        if name in ("input_ids", "token_groups"):  # the groups are those of the prompt
            continue
        if isinstance(value, Tensor) and value.shape == inputs["input_ids"].shape:
            fill = 1 if name == "attention_mask" else 0
            longer[name] = torch.nn.functional.pad(value, (0, output.shape[1]), value=fill)
    return longer


def sample_digest(sample: Mapping[str, Any]) -> str:
    """SHA-256 of a sample's inputs and answers, in hexadecimal digits."""
    found = hashlib.sha256()

    def note(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(f"{tuple(value.shape)}{value.dtype}".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, list | tuple):
            found.update(f"{type(value).__name__} {len(value)}".encode())
            for item in value:
                note(item)
        else:
            found.update(repr(value).encode())

    for name, value in sorted(sample.items()):
        found.update(name.encode())
        note(value)
    return found.hexdigest()
