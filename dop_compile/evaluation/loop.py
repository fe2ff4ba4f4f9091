"""Measure samples one by one: resumable, shared by processes, with a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from dop_compile.evaluation.comparison import question_digest
from dop_compile.evaluation.methods import ORIGINAL
from dop_compile.search.processes import Team, gather
from dop_compile.search.progress import Progress, check_sample

__all__ = ["measured_rows", "measured_runs"]

Sample = Mapping[str, Any]


def measured_rows(
    team: Team,
    progress: Progress,
    samples: Sequence[Sample],
    digest: Callable[[Sample, int], str],
    measure: Callable[[Sample, int], dict[str, Any]],
    what: str,
) -> list[dict[str, Any]]:
    """A row per sample: those that were finished, those that this process measures, and those of the others.

    Args:
        team: how processes share the samples.
        progress: where rows are kept; in them "digest" and what `measure` returned.
        digest: of a sample and its number; finished rows must have the same.
        measure: of a sample and its number, as JSON values.
        what: is being done, for the progress bar.

    Raises:
        ValueError: from `measure`, naming the sample; a finished sample is another one now.
    """
    finished = set(progress.rows)
    for number in finished:
        if number % team.processes == team.rank:
            check_sample(number, digest(samples[number], number), progress.rows[number]["digest"])
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
                row = measure(sample, number)
            except ValueError as error:
                raise ValueError(f"sample {number}: {error}") from error
            progress.add(number, {"digest": digest(sample, number), **row})
            bar.update()
    return gather(progress.rows)


def measured_runs(
    team: Team,
    kept: Mapping[str, Progress],
    samples: Sequence[Sample],
    own: Mapping[str, Sequence[Sample] | None],
    measure: Callable[[Sample, int, Sequence[str], str | None], dict[str, dict[str, Any]]],
) -> dict[str, list[dict[str, Any]]]:
    """Per method a row per sample, as `measured_rows`: those that were finished are not measured again.

    Args:
        team: how processes share the samples.
        kept: per method, where its rows are.
        own: per method, the samples that it has in place of the others'.
        measure: of a sample, its number, the methods that lack it and what the original said, if that is finished: a
            row of each, as JSON values.

    Raises:
        ValueError: from `measure`, naming the sample; a finished sample is another one now.
    """

    def digest(label: str, number: int, sample: Sample) -> str:
        others = own[label]
        return question_digest(sample, None if others is None else others[number])

    numbers = range(len(samples))
    lacking = {number: [label for label in kept if number not in kept[label].rows] for number in numbers}
    for number in team.share(samples):
        if finished := [label for label in kept if label not in lacking[number]]:
            sample = samples[number]  # once: it may be made when it is asked for
            for label in finished:
                check_sample(number, digest(label, number, sample), kept[label].rows[number]["digest"])
    todo = [number for number in numbers if lacking[number]]
    with tqdm(
        desc="answering",
        total=len(samples),
        initial=len(samples) - len(todo),
        leave=False,
        disable=not team.leader,
        file=sys.stderr,
    ) as bar:
        for index, number in enumerate(todo):
            if index % team.processes != team.rank:
                bar.update(team.leader)
                continue
            original = kept[ORIGINAL].rows[number]["run"]["answer"] if _finished(kept, number) else None
            sample = samples[number]
            try:
                found = measure(sample, number, lacking[number], original)
            except ValueError as error:
                raise ValueError(f"sample {number}: {error}") from error
            for label, row in found.items():
                kept[label].add(number, {"digest": digest(label, number, sample), **row})
            bar.update()
    return {label: gather(progress.rows) for label, progress in kept.items()}


def _finished(kept: Mapping[str, Progress], number: int) -> bool:
    """Whether the original has answered a sample."""
    return ORIGINAL in kept and number in kept[ORIGINAL].rows
