"""What whole policies cost on samples: joint divergence, and right answers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dop_compile.compiler import dop_compile
from dop_compile.dropin import generate_under
from dop_compile.policy import Policy
from dop_compile.policy_json import choice
from dop_compile.search.meter import ANSWERS, SampleMeter
from dop_compile.search.metrics import METRICS, is_right

__all__ = ["measure_accuracy", "measure_policies"]


def measure_policies(
    model: Any,
    samples: Sequence[Mapping[str, Any]],
    policies: Sequence[Policy],
    *,
    metric: str = "top_k_kl",
    tokens: int = 4,
    decode: Callable[[Tensor], str] | None = None,
    backend: str = "eager",
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(policies, samples) joint divergence of whole policies from the original.

    Args: as `measure_divergences`.
    """
    choice("metric", metric, METRICS)
    if not len(samples):
        raise ValueError("samples: expected at least one, got none")
    if not len(policies):
        raise ValueError("policies: expected at least one, got none")
    compiled = dop_compile(model, {str(number): policy for number, policy in enumerate(policies)}, backend=backend)
    found = np.empty((len(policies), len(samples)))
    for number in tqdm(range(len(samples)), desc="measuring policies", leave=False, file=sys.stderr):
        meter = SampleMeter(compiled, samples[number], metric, tokens=tokens, decode=decode)
        found[:, number] = [meter.divergence(policy) for policy in policies]
    return found


@torch.no_grad()
def measure_accuracy(
    model: Any,
    samples: Sequence[Mapping[str, Any]],
    policies: Sequence[Policy],
    decode: Callable[[Tensor], str],
    *,
    backend: str = "eager",
    **settings: Any,
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(policies, samples) whether the model under a policy answers right.

    Args:
        model: the untouched Hugging Face model.
        samples: model inputs of one row each, and `answers`.
        decode: new token ids to text.
        settings: of `generate`, beside greedy decoding.

    Raises:
        ValueError: no samples, or one without answers.
    """
    if not len(samples):
        raise ValueError("samples: expected at least one, got none")
    compiled = dop_compile(model, policies[0], backend=backend)
    found = np.empty((len(policies), len(samples)), dtype=bool)
    for number in tqdm(range(len(samples)), desc="answering", leave=False, file=sys.stderr):
        sample = samples[number]
        answers = sample.get(ANSWERS)
        if not answers:
            raise ValueError(f"sample {number}: it has no answers to compare with")
        inputs = {name: value for name, value in sample.items() if name != ANSWERS}
        columns = inputs["input_ids"].shape[1]
        for index, policy in enumerate(policies):
            output = generate_under(compiled, policy, **inputs, do_sample=False, **settings)
            found[index, number] = is_right(decode(output[0, columns:]), answers)
    return found
