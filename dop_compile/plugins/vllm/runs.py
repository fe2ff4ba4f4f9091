"""Rows of one step, as vLLM batches them: which are visual, and what each kind of layer makes of them.

A step computes, for each request, the tokens from `ends - count` to `ends`, one row each, requests one after another.
Visual tokens cut them into runs. Kernels align causal masks to the right, so whatever queries are not a suffix of what
they see become sequences of their own, which end where their queries do:

    frozen   each run of other tokens           keys: every token, at its own place
    absent   a request's other tokens together  keys: other tokens, one after another without gaps
    keyless  each run of other tokens, and each visual token alone          keys: as `absent`

Numbers are of requests and rows, on the CPU (numpy, int64).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from dop_compile.plugins.vllm.roles import Attention

__all__ = ["Run", "Sequences", "Step", "step_of"]

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one request, all visual or none.

    Args:
        request: its number in the step.
        row: of the first token.
        begin, end: positions in the prompt that vLLM sees.
        visual: which they are.
        before: visual tokens of the request that stand before them.
    """

    request: int
    row: int
    begin: int
    end: int
    visual: bool
    before: int

    def __len__(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Sequences:
    """Queries and what they see.

    Args:
        rows: (queries,) rows of the step that are queries, in order.
        requests: (sequences,) whose cache each reads.
        counts: (sequences,) queries of each.
        shortened: (sequences,) by how much each sees less than its request holds after the step.
    """

    rows: Numbers
    requests: Numbers
    counts: Numbers
    shortened: Numbers


@dataclass(frozen=True)
class Step:
    """All runs of a step, in order of rows. `ends`: (requests,) tokens of each request after it."""

    runs: tuple[Run, ...]
    ends: Numbers

    @property
    def visual(self) -> Numbers:
        return _rows(run for run in self.runs if run.visual)

    @property
    def others(self) -> Numbers:
        return _rows(run for run in self.runs if not run.visual)

    @property
    def dropped(self) -> Numbers:
        """(others,) visual tokens before each other row: by so much its key stands earlier where they are absent."""
        kept = [run for run in self.runs if not run.visual]
        return np.repeat(_numbers(run.before for run in kept), _numbers(map(len, kept)))

    def sequences(self, attention: Attention) -> Sequences:
        """Those of a layer in which visual tokens are `attention`, one of "frozen", "absent" and "keyless"."""
        kept = [run for run in self.runs if not run.visual]
        if attention == "frozen":
            return self._sequences(self.others, [(run.request, len(run), run.end) for run in kept])
        if attention == "absent":
            return self._sequences(self.others, [_together(list(own)) for _, own in groupby(kept, _request)])
        seeing = [run for run in self.runs if not run.visual or run.begin > run.before]
        sequences = [
            (run.request, size, run.end - run.before if not run.visual else run.begin - run.before)
            for run in seeing
            for size in ([1] * len(run) if run.visual else [len(run)])
        ]
        return self._sequences(_rows(seeing), sequences)

    @property
    def unseeing(self) -> Numbers:
        """Rows of visual tokens before which there is no other token: as queries they see nothing."""
        return _rows(run for run in self.runs if run.visual and run.begin == run.before)

    def _sequences(self, rows: Numbers, items: Sequence[tuple[int, int, int]]) -> Sequences:
        """Of (request, queries, keys that the last of them sees)."""
        requests, counts, seen = np.array(items, np.int64).reshape(-1, 3).T
        return Sequences(rows, requests, counts, self.ends[requests] - seen)


def _together(own: Sequence[Run]) -> tuple[int, int, int]:
    return own[0].request, sum(map(len, own)), own[-1].end - own[-1].before


def _request(run: Run) -> int:
    return run.request


def step_of(starts: Numbers, ends: Numbers, ranges: Mapping[int, Sequence[tuple[int, int]]]) -> Step:
    """The step with rows `starts[r]` to `starts[r + 1]` of request r, of which `ends[r]` tokens exist after it.

    Args:
        starts: (requests + 1,).
        ends: (requests,).
        ranges: by request, first and last visual token (both included), in any order. Requests without rows are those
            that vLLM pads a batch with.
    """
    runs: list[Run] = []
    for request in range(len(ends)):
        row, count = int(starts[request]), int(starts[request + 1] - starts[request])
        if count:
            runs += _runs(request, row, int(ends[request]) - count, int(ends[request]), ranges.get(request, ()))
    return Step(tuple(runs), np.asarray(ends, np.int64))


def _runs(request: int, row: int, begin: int, end: int, ranges: Sequence[tuple[int, int]]) -> Iterator[Run]:
    at, before = begin, 0
    for first, last in sorted(ranges):
        visual, stop = max(first, begin), min(last + 1, end)
        if visual < stop:
            if at < visual:
                yield Run(request, row + at - begin, at, visual, False, before)
            yield Run(request, row + visual - begin, visual, stop, True, before + visual - first)
            at = stop
        before += max(0, stop - first)
    if at < end:
        yield Run(request, row + at - begin, at, end, False, before)


def _rows(runs: Iterable[Run]) -> Numbers:
    found = [np.arange(run.row, run.row + len(run)) for run in runs]
    return np.concatenate(found) if found else _numbers()


def _numbers(values: object = ()) -> Numbers:
    return np.array(list(values), np.int64)  # type: ignore[call-overload]
