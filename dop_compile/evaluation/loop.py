"""Measure samples one by one: resumable, shared by processes, with a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from dop_compile.search.processes import Team, gather
from dop_compile.search.progress import Progress, check_sample

__all__ = ["measured_rows"]

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
