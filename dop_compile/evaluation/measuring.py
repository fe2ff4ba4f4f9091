"""Ask every method every question, and note answers, costs and times.

    counts = count_tokens(model, samples)
    planner = Planner.of(model, counts)
    result = evaluate(model, samples, [planner.named("random", 0.28)], decode, counts=counts, max_new_tokens=16)

Per sample all methods answer one after the other, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dop_compile.compiler import dop_compile
from dop_compile.evaluation.answers import prompt_counts
from dop_compile.evaluation.comparison import Comparison, question_digest
from dop_compile.evaluation.environment import device_name, environment
from dop_compile.evaluation.loop import measured_rows, measured_runs
from dop_compile.evaluation.methods import ORIGINAL, Method
from dop_compile.evaluation.result import Evaluation, Measured, read_runs
from dop_compile.hf.fingerprint import model_fingerprint
from dop_compile.policy.policy import Policy
from dop_compile.search.meter import TASK, model_inputs, sample_digest
from dop_compile.search.processes import Team, barrier, of_first
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
        resume: where the result is saved; every finished answer is kept beside it, and a later call goes on there. Of
            a result of these samples that is there already only methods that it lacks are run; those that it has and
            that are not asked for stay in it, and in what is returned.
        settings: of `generate`, beside greedy decoding (such as `max_new_tokens`), as JSON values.

    Raises:
        TypeError, ValueError: no samples, methods of the same label, a sample without answers or, where others have
            one, without a task; what is found at `resume` belongs to another evaluation, or has another method of the
            same label.
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
    done: Evaluation | None = of_first(lambda: Evaluation.load(path) if path is not None and path.exists() else None)
    if path is not None and done is not None:
        _check_known(path, done, header, samples, chosen)
        chosen = tuple(method for method in chosen if method.label not in done.labels)
        if not chosen:
            return done
    kept = {}
    for entry in header["methods"]:
        if done is None or entry[0] not in done.labels:
            beside = None if path is None else path.with_name(f"{path.name}.{_digest(entry)[:12]}")
            kept[entry[0]] = Progress(beside, {**header, "methods": [entry]}, team.rank, writes=team.writes)
    barrier()  # all have read what is there before anybody writes
    known = (count_tokens(model, samples) if done is None else done.counts) if counts is None else tuple(counts)
    comparison = Comparison(model, chosen, decode, backend, settings)

    def measure(sample: Sample, number: int, labels: Sequence[str], original: str | None) -> dict[str, dict[str, Any]]:
        task = tasks[number] if tasks is not None else str(sample.get(TASK, ""))
        if done is not None:
            original = done.method(ORIGINAL).runs[number].answer
        runs = comparison.runs(sample, number, known[number], labels, original)
        return {label: {"task": task, "run": run} for label, run in runs.items()}

    rows = measured_runs(team, kept, samples, {method.label: method.samples for method in chosen}, measure)
    result = _merged(done, chosen, rows, header, {**environment(model.device), "memory": comparison.memory}, known)
    if path is not None:
        if team.leader:
            result.save(path)
            for progress in kept.values():
                progress.remove()
        barrier()
    return result


def _check_known(
    path: Path, done: Evaluation, header: dict[str, Any], samples: Sequence[Sample], methods: Sequence[Method]
) -> None:
    """Raises ValueError where the result at `path` is of other samples, or not of the methods that it names."""
    check_header(path, {**done.header, "methods": None}, {**header, "methods": None})
    if done.digests is None:
        raise ValueError(
            f"{path} does not say which samples it is of, as an earlier release saved it; choose another file, or "
            "remove it to evaluate again"
        )
    again = [method for method in methods if method.label in done.labels]
    for number, known in enumerate(done.digests):
        sample = samples[number]
        check_sample(number, question_digest(sample), known)
        for method in again:
            own = done.method(method.label).digests
            if own is not None and method.samples is not None:
                check_sample(number, question_digest(sample, method.samples[number]), own[number])
    before, now = dict(done.header["methods"]), dict(header["methods"])
    if other := [label for label in done.labels if label in now and before[label] != now[label]]:
        raise ValueError(
            f"{path} has another method {other[0]!r}, of another policy; name this one otherwise (NAME=FILE), choose "
            "another file, or remove it to evaluate again"
        )


def _merged(
    done: Evaluation | None,
    methods: Sequence[Method],
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    header: dict[str, Any],
    where: dict[str, Any],
    counts: Counts,
) -> Evaluation:
    """The result with what was added to it."""
    session = 0 if done is None else 1 + max(method.session for method in done.methods)
    added = tuple(
        Measured(
            method.name,
            method.budget,
            method.label,
            method.policy,
            read_runs([row["run"] for row in rows[method.label]]),
            session,
            None if method.samples is None else tuple(row["digest"] for row in rows[method.label]),
        )
        for method in methods
    )
    if done is not None:
        before = [entry for entry in done.header["methods"] if entry[0] in done.labels]
        new = [entry for entry in header["methods"] if entry[0] not in done.labels]
        return replace(done, header={**header, "methods": before + new}, methods=(*done.methods, *added))
    first = rows[methods[0].label]
    return Evaluation(
        header=header,
        environment=where,
        tasks=check_tasks([row["task"] for row in first]),
        counts=counts,
        methods=added,
        digests=tuple(row["digest"] for row in first),
    )


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


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _header(
    model: Any,
    samples: int,
    methods: Sequence[Method],
    tasks: Sequence[str] | None,
    backend: str,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    def contents(method: Method) -> Any:
        return None if method.policy is None else method.policy.replace(provenance=None).to_json()

    header = {
        "model": type(model).__name__,
        "fingerprint": model_fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(model.device),
        "backend": backend,
        "samples": samples,
        "methods": [[method.label, _digest([contents(method), method.counts])] for method in methods],
        "tasks": None if tasks is None else _digest(list(tasks)),
        "settings": dict(sorted(settings.items())),
    }
    try:
        found: dict[str, Any] = json.loads(json.dumps(header))
    except TypeError as error:
        raise TypeError(f"settings: expected JSON values, {error}") from error
    return found
