"""Ask every method every question, and note answers, costs and times.

    counts = count_tokens(model, samples)
    planner = Planner.of(model, counts)
    result = evaluate(model, samples, [planner.named("random", 0.28)], decode, counts=counts, max_new_tokens=16)

Per sample all methods answer one after the other, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dop_compile.compiler import dop_compile
from dop_compile.evaluation.answers import prompt_counts
from dop_compile.evaluation.comparison import Comparison, question_digest
from dop_compile.evaluation.environment import device_name, environment
from dop_compile.evaluation.loop import measured_rows
from dop_compile.evaluation.methods import ORIGINAL, Method
from dop_compile.evaluation.result import Evaluation, Measured, read_runs
from dop_compile.fingerprint import model_fingerprint
from dop_compile.policy import Policy
from dop_compile.search.meter import TASK, model_inputs, sample_digest
from dop_compile.search.processes import Team, barrier
from dop_compile.search.progress import Progress, check_header, check_sample

__all__ = ["check_tasks", "count_tokens", "evaluate"]

ONE_TASK = "all"
"""The task of samples that name none."""

Sample = Mapping[str, Any]
Counts = tuple[tuple[int, int, int], ...]


def count_tokens(model: Any, samples: Sequence[Sample], *, resume: str | os.PathLike[str] | None = None) -> Counts:
    """System, visual and text tokens of every sample, before reduction; runs the vision tower alone.

    Under `torchrun` every process takes its share of the samples and returns the same. With `resume`, a path, counted
    samples are kept in files beside it; they stay.

    Raises:
        ValueError: no samples, or one that is not of one row; what is found at `resume` belongs to other samples.
    """
    if not len(samples):
        raise ValueError("samples: expected at least one, got none")
    team = Team.of(model)
    header = {"counts of": model_fingerprint(model) if resume is not None else "", "samples": len(samples)}
    progress = Progress(None if resume is None else Path(resume), header, team.rank, writes=team.writes)
    barrier()  # all have read what is there before anybody writes
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    compiled = dop_compile(model, Policy.full(layers), backend="eager")
    rows = measured_rows(
        team,
        progress,
        samples,
        lambda sample, number: sample_digest(sample),
        lambda sample, number: {"counts": prompt_counts(compiled, model_inputs(sample))},
        "counting tokens",
    )
    return tuple((row["counts"][0], row["counts"][1], row["counts"][2]) for row in rows)


def check_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """The samples' tasks; one for all where none has any.

    Raises:
        ValueError: some have a task and some do not.
    """
    if not any(tasks):
        return (ONE_TASK,) * len(tasks)
    if not all(tasks):
        raise ValueError(
            f"sample {list(tasks).index('')} has no task, and others have one; name the task of every sample or of none"
        )
    return tuple(tasks)


def evaluate(
    model: Any,
    samples: Sequence[Sample],
    methods: Sequence[Method],
    decode: Callable[[Tensor], str],
    *,
    counts: Counts | None = None,
    tasks: Sequence[str] | None = None,
    backend: str = "eager",
    resume: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Evaluation:
    """Compare methods on the same samples; the untouched model is always among them.

    Under `torchrun` every process takes its share of the samples and returns the same result.

    Args:
        model: the untouched Hugging Face model, in eval mode.
        samples: per sample what the model's `forward` takes for a prompt of one row, `answers` (a list of strings), and
            possibly `task`. May be lazy: each is asked for by its number.
        methods: see `Planner`.
        decode: new token ids to text.
        counts: of the samples, where they are known already (`count_tokens`).
        tasks: of each sample, where samples do not name theirs. Without any, all are of the task "all".
        backend: of `dop_compile`, for the pruned models; the original runs as it is.
        resume: where the result is saved; every finished sample is kept beside it, and a later call goes on there. A
            result of these samples that is there already is returned.
        settings: of `generate`, beside greedy decoding (such as `max_new_tokens`), as JSON values.

    Raises:
        TypeError, ValueError: no samples, methods of the same label, a sample without answers or, where others have
            one, without a task; what is found at `resume` belongs to another evaluation.
    """
    if not len(samples):
        raise ValueError("samples: expected at least one, got none")
    for name, given in (("tasks", tasks), ("counts", counts)):
        if given is not None and len(given) != len(samples):
            raise ValueError(f"{name}: expected one entry for each of {len(samples)} samples, got {len(given)}")
    if tasks is not None:
        tasks = check_tasks(tasks)
    chosen = _with_original(methods)
    team = Team.of(model)
    header = _header(model, len(samples), chosen, tasks, backend, settings)
    path = None if resume is None else Path(resume)
    progress = Progress(path, header, team.rank, writes=team.writes)
    barrier()  # all have read what is there before anybody writes
    digest = functools.partial(question_digest, chosen)
    if path is not None and path.exists():
        done = _finished(path, header, samples, digest)
        if team.leader:
            progress.remove()
        return done
    known = count_tokens(model, samples) if counts is None else tuple(counts)
    comparison = Comparison(model, chosen, decode, backend, settings)

    def measure(sample: Sample, number: int) -> dict[str, Any]:
        task = tasks[number] if tasks is not None else str(sample.get(TASK, ""))
        return {"task": task, "runs": comparison.runs(sample, number, known[number])}

    rows = measured_rows(team, progress, samples, digest, measure, "answering")
    per_sample = [read_runs(row["runs"]) for row in rows]
    result = Evaluation(
        header=header,
        environment={**environment(model.device), "memory": comparison.memory},
        tasks=check_tasks([row["task"] for row in rows]),
        counts=known,
        methods=tuple(
            Measured(method.name, method.budget, method.label, method.policy, tuple(runs[i] for runs in per_sample))
            for i, method in enumerate(chosen)
        ),
        digests=tuple(row["digest"] for row in rows),
    )
    if path is not None:
        if team.leader:
            result.save(path)
            progress.remove()
        barrier()
    return result


def _finished(
    path: Path, header: dict[str, Any], samples: Sequence[Sample], digest: Callable[[Sample, int], str]
) -> Evaluation:
    """The result at `path`, if it is that of this evaluation."""
    found = Evaluation.load(path)
    check_header(path, dict(found.header), header)
    if found.digests is None:
        raise ValueError(
            f"{path} does not say which samples it is of, as an earlier release saved it; choose another file, or "
            "remove it to evaluate again"
        )
    for number, known in enumerate(found.digests):
        check_sample(number, digest(samples[number], number), known)
    return found


def _with_original(methods: Sequence[Method]) -> tuple[Method, ...]:
    """The untouched model first, then the others."""
    original = Method(ORIGINAL)
    chosen = (original, *(method for method in methods if method != original))
    labels = [method.label for method in chosen]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(
            f"methods: {', '.join(twice)} given twice; give each method and budget once, or name them apart"
        )
    return chosen


def _header(
    model: Any,
    samples: int,
    methods: Sequence[Method],
    tasks: Sequence[str] | None,
    backend: str,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    def digest(value: Any) -> str:
        return hashlib.sha256(json.dumps(value).encode()).hexdigest()

    def contents(method: Method) -> Any:
        return None if method.policy is None else method.policy.replace(provenance=None).to_json()

    header = {
        "model": type(model).__name__,
        "fingerprint": model_fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(model.device),
        "backend": backend,
        "samples": samples,
        "methods": [[method.label, digest([contents(method), method.counts])] for method in methods],
        "tasks": None if tasks is None else digest(list(tasks)),
        "settings": dict(sorted(settings.items())),
    }
    try:
        found: dict[str, Any] = json.loads(json.dumps(header))
    except TypeError as error:
        raise TypeError(f"settings: expected JSON values, {error}") from error
    return found
