"""All methods on one sample: what each says, what it costs, and how long it takes."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from dop_compile.compiler import dop_compile
from dop_compile.evaluation.answers import Answer, Asker
from dop_compile.evaluation.methods import ORIGINAL, Method
from dop_compile.evaluation.result import Run
from dop_compile.hf.dimensions import DecoderDims
from dop_compile.policy.costs import kv_cache_bytes, policy_tokens, prefill_flops
from dop_compile.policy.policy import Policy
from dop_compile.reports.executed import SampleTokens, layer_costs
from dop_compile.search.meter import ANSWERS, model_inputs, sample_digest
from dop_compile.search.metrics import is_right

__all__ = ["Comparison", "question_digest"]

Sample = Mapping[str, Any]


def question_digest(sample: Sample, own: Sample | None = None) -> str:
    """SHA-256 of a sample, and of what a method has in its place."""
    both = [sample_digest(one) for one in (sample, own) if one is not None]
    return hashlib.sha256("".join(both).encode()).hexdigest()


class Comparison:
    """Asks every method.

    Args:
        model: the untouched model.
        methods: what is asked.
        decode: new token ids to text.
        backend: of `dop_compile`.
        settings: of `generate`.
    """

    def __init__(
        self,
        model: Any,
        methods: Sequence[Method],
        decode: Callable[[Tensor], str],
        backend: str,
        settings: Mapping[str, Any],
    ):
        self._methods, self._decode = tuple(methods), decode
        self._dims = DecoderDims.from_config(model.config)
        self._full = Policy.full(self._dims.num_layers)
        self._bytes: int = model.dtype.itemsize
        policies = {method.label: method.policy for method in methods if method.policy is not None}
        compiled = dop_compile(model, policies or self._full, backend=backend)
        self._state = compiled.dop
        self._asker = Asker(model, compiled, settings)
        self._cost = lru_cache(maxsize=None)(self._costs)
        self._warm: set[str] = set()

    @property
    def memory(self) -> str:
        """What peak memory is, in words."""
        return self._asker.memory.what

    def runs(
        self,
        sample: Sample,
        number: int,
        counts: tuple[int, int, int],
        labels: Collection[str],
        original: str | None,
    ) -> dict[str, dict[str, Any]]:
        """A run of each method of `labels`, as JSON values.

        Args:
            original: what the untouched model says, where it is not among them.

        Raises:
            ValueError: the sample has no answers.
        """
        right = sample.get(ANSWERS)
        if not right:
            raise ValueError("it has no answers to compare with")
        if isinstance(right, str):
            raise ValueError(f"answers: expected a list of strings, got {right!r}")
        asked = [method for method in self._methods if method.label in labels]
        inputs = [model_inputs(sample if m.samples is None else m.samples[number]) for m in asked]
        for method, own in zip(asked, inputs, strict=True):
            if method.label not in self._warm:  # what is compiled or allocated on first use is no part of the times
                self._asker.ask(own, method.policy)
                self._warm.add(method.label)
        found: dict[str, dict[str, Any]] = {}
        for method, own in zip(asked, inputs, strict=True):
            answer = self._asker.ask(own, method.policy)
            text = self._decode(answer.ids)
            original = text if method.label == ORIGINAL else original
            assert original is not None
            changed = not is_right(text, [original])
            system, visual, words = own_counts = counts if method.counts is None else method.counts[number]
            # What is executed is of the tokens that entered: some reducers keep fewer than the policy allows
            entered = (system, visual - answer.dropped, words)
            cost = self._cost(method.label, method.policy, own_counts if method.policy is None else counts, entered)
            found[method.label] = dataclasses.asdict(_run(answer, text, is_right(text, right), changed, cost))
        return found

    def _costs(
        self, label: str, policy: Policy | None, counts: tuple[int, int, int], entered: tuple[int, int, int]
    ) -> tuple[int, int, int]:
        """Policy FLOPs of one prompt; executed FLOPs and KV bytes of what entered of it."""
        flops = prefill_flops(self._dims, policy or self._full, *counts)
        if policy is None:
            return flops, flops, kv_cache_bytes(self._dims, policy_tokens(self._full, *counts), self._bytes)
        layers = layer_costs(self._state, label, SampleTokens(*entered, rows=1, use_cache=True), self._dims)
        return flops, sum(layer.flops or 0 for layer in layers), sum(layer.kv_bytes or 0 for layer in layers)


def _run(answer: Answer, text: str, right: bool, changed: bool, cost: tuple[int, int, int]) -> Run:
    flops, executed, kv_bytes = cost
    return Run(
        answer=text,
        right=right,
        changed=changed,
        tokens=len(answer.ids),
        flops=flops,
        executed_flops=executed,
        kv_bytes=kv_bytes,
        vision_ms=answer.vision_ms,
        selection_ms=answer.selection_ms,
        prefill_ms=answer.prefill_ms,
        decode_ms=answer.decode_ms,
        memory_bytes=answer.memory_bytes,
    )
