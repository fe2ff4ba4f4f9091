"""What whole policies cost on samples: joint divergence, and right answers."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dop_compile.checks import choice
from dop_compile.compiler import dop_compile
from dop_compile.drop_in.model import generate_under
from dop_compile.hf.fingerprint import model_fingerprint
from dop_compile.policy.policy import Policy
from dop_compile.search.meter import ANSWERS, SampleMeter, model_inputs, resized, resizing, sample_digest
from dop_compile.search.metrics import METRICS, is_right
from dop_compile.search.processes import Team, barrier, gather
from dop_compile.search.progress import Progress, check_sample

__all__ = ["measure_accuracy", "measure_policies"]

Losses = np.ndarray[Any, np.dtype[np.float64]]
Answers = np.ndarray[Any, np.dtype[np.bool_]]


def measure_policies(
    model: Any,
    samples: Sequence[Mapping[str, Any]],
    policies: Sequence[Policy],
    *,
    metric: str = "top_k_kl",
    tokens: int = 4,
    decode: Callable[[Tensor], str] | None = None,
    backend: str = "eager",
    resume: str | os.PathLike[str] | None = None,
) -> Losses:
    """(policies, samples) joint divergence of whole policies from the original.

    Under `torchrun` every process takes its share of the samples and returns the same array.

    Args:
        model, samples, metric, tokens, decode, backend: as `measure_divergences`.
        resume: every finished sample is kept in files beside this path, and a later call goes on there; they stay.

    Raises:
        TypeError, ValueError: no samples or policies, a policy of another model; what is found at `resume` belongs to
            another measurement.
    """
    choice("metric", metric, METRICS)
    options = (("tokens", tokens),) if METRICS[metric].forced else ()
    progress = _progress(resume, model, samples, policies, {"metric": [metric, *options]})
    compiled = dop_compile(model, policies[0], backend=backend)

    def row(number: int, sample: Mapping[str, Any]) -> list[float]:
        resize = resizing(samples, number)
        meter = SampleMeter(compiled, sample, metric, tokens=tokens, decode=decode, resize=resize)
        return [meter.divergence(policy) for policy in policies]

    return _rows(Team.of(model), samples, progress, row, "measuring policies", float)


@torch.no_grad()
def measure_accuracy(
    model: Any,
    samples: Sequence[Mapping[str, Any]],
    policies: Sequence[Policy],
    decode: Callable[[Tensor], str],
    *,
    backend: str = "eager",
    resume: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Answers:
    """(policies, samples) whether the model under a policy answers right.

    Under `torchrun` every process takes its share of the samples and returns the same array.

    Args:
        model: the untouched Hugging Face model.
        samples: model inputs of one row each, and `answers`.
        decode: new token ids to text.
        resume: as `measure_policies`.
        settings: of `generate`, beside greedy decoding.

    Raises:
        TypeError, ValueError: no samples or policies, a policy of another model, a sample without answers; what is
            found at `resume` belongs to another measurement.
    """
    shown = {name: repr(value) for name, value in sorted(settings.items())}
    progress = _progress(resume, model, samples, policies, {"metric": ["accuracy", shown]})
    compiled = dop_compile(model, policies[0], backend=backend)

    def row(number: int, sample: Mapping[str, Any]) -> list[bool]:
        answers = sample.get(ANSWERS)
        if not answers:
            raise ValueError("it has no answers to compare with")
        resize = resizing(samples, number)
        found = []
        for policy in policies:
            inputs = model_inputs(resized(sample, policy, resize))
            output = generate_under(compiled, policy, **inputs, do_sample=False, **settings)
            found.append(is_right(decode(output[0, inputs["input_ids"].shape[1] :]), answers))
        return found

    return _rows(Team.of(model), samples, progress, row, "answering", bool)


def _progress(
    resume: str | os.PathLike[str] | None,
    model: Any,
    samples: Sequence[Mapping[str, Any]],
    policies: Sequence[Policy],
    measured: dict[str, Any],
) -> Progress:
    for name, given in (("samples", samples), ("policies", policies)):
        if not len(given):
            raise ValueError(f"{name}: expected at least one, got none")
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    fingerprint = model_fingerprint(model)
    for number, policy in enumerate(policies):
        try:
            policy.check_model(layers, fingerprint)
        except ValueError as error:
            raise ValueError(f"policies[{number}]: {error}") from error
    plain = [policy.replace(provenance=None).to_json() for policy in policies]
    header = {
        "fingerprint": fingerprint,
        "samples": len(samples),
        "policies": hashlib.sha256(json.dumps(plain).encode()).hexdigest(),
        **measured,
    }
    team = Team.of(model)
    progress = Progress(None if resume is None else Path(resume), header, team.rank, writes=team.writes)
    barrier()  # all have read what is there before anybody writes
    return progress


def _rows(
    team: Team,
    samples: Sequence[Mapping[str, Any]],
    progress: Progress,
    row: Callable[[int, Mapping[str, Any]], list[Any]],
    what: str,
    kind: type,
) -> np.ndarray[Any, np.dtype[Any]]:
    """(policies, samples) of the rows that this process measures, those that were finished, and those of the others."""
    finished = set(progress.rows)
    for number in finished:
        if number % team.processes == team.rank:
            check_sample(number, sample_digest(samples[number]), progress.rows[number]["digest"])
    todo = [number for number in range(len(samples)) if number not in finished]
    with tqdm(
        desc=what, total=len(samples), initial=len(finished), leave=False, disable=not team.leader, file=sys.stderr
    ) as bar:
        for index, number in enumerate(todo):
            if index % team.processes != team.rank:
                bar.update(team.leader)
                continue
            sample = samples[number]
            try:
                values = row(number, sample)
            except ValueError as error:
                raise ValueError(f"sample {number}: {error}") from error
            progress.add(number, {"digest": sample_digest(sample), "values": values})
            bar.update()
    return np.array([found["values"] for found in gather(progress.rows)], dtype=kind).T
