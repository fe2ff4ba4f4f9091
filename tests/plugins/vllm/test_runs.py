"""Runs and sequences of a step, against masks written out token by token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from dop_compile.plugins.vllm.roles import Attention
from dop_compile.plugins.vllm.runs import step_of

Ranges = Sequence[tuple[int, int]]
REQUESTS: list[tuple[int, int, Ranges]] = [  # computed before, computed now, visual tokens (both ends included)
    (0, 9, [(2, 4), (6, 6)]),  # two pictures in one prompt
    (4, 5, [(2, 5)]),  # the chunk before ended in a picture
    (0, 4, [(1, 7)]),  # this one does
    (3, 2, [(1, 6)]),  # nothing but visual tokens
    (12, 1, [(0, 5)]),  # decoding, picture first
    (0, 3, []),  # text alone
    (0, 5, [(0, 2)]),  # a picture first: its tokens see no other
    (0, 0, [(1, 2)]),  # padding
]


def visible(attention: Attention, request: tuple[int, int, Ranges]) -> dict[int, list[int]]:
    """Positions that are queries now, and what each sees."""
    before, now, ranges = request
    visual = {p for first, last in ranges for p in range(first, last + 1)}
    queries = [p for p in range(before, before + now) if p not in visual or attention == "keyless"]
    keys = [p for p in range(before + now) if p not in visual or attention == "frozen"]
    return {p: seen for p in queries if (seen := [k for k in keys if k <= p])}


@pytest.mark.parametrize("attention", ["frozen", "absent", "keyless"])
def test_each_query_sees_what_a_causal_mask_over_the_kept_keys_shows(attention: Attention) -> None:
    starts = np.cumsum([0, *(now for _, now, _ in REQUESTS)])
    ends = np.array([before + now for before, now, _ in REQUESTS])
    step = step_of(starts, ends, {n: ranges for n, (_, _, ranges) in enumerate(REQUESTS)})
    wanted = {
        int(starts[number]) + position - request[0]: len(seen)
        for number, request in enumerate(REQUESTS)
        for position, seen in visible(attention, request).items()
    }
    found = step.sequences(attention)
    lengths = ends[found.requests] - found.shortened
    # Kernels align a causal mask to the right: the last query of a sequence sees all of it, the one before one less
    seen = [length - count + n + 1 for length, count in zip(lengths, found.counts, strict=True) for n in range(count)]
    assert dict(zip(found.rows.tolist(), map(int, seen), strict=True)) == wanted
    owner = np.repeat(found.requests, found.counts)
    assert owner.tolist() == [int(np.searchsorted(starts, row, side="right")) - 1 for row in found.rows]


def test_keys_without_gaps_follow_one_another() -> None:
    starts = np.cumsum([0, *(now for _, now, _ in REQUESTS)])
    ends = np.array([before + now for before, now, _ in REQUESTS])
    step = step_of(starts, ends, {n: ranges for n, (_, _, ranges) in enumerate(REQUESTS)})
    places = []
    for before, now, ranges in REQUESTS:
        visual = {p for first, last in ranges for p in range(first, last + 1)}
        others = [p for p in range(before + now) if p not in visual]
        places += [others.index(p) for p in range(before, before + now) if p not in visual]
    rows = np.concatenate([np.arange(before, before + now) for before, now, _ in REQUESTS])
    assert (rows[step.others] - step.dropped).tolist() == places
    assert sorted([*step.others, *step.visual]) == list(range(int(starts[-1])))


def test_visual_tokens_that_see_nothing_are_named() -> None:
    step = step_of(np.array([0, 4]), np.array([4]), {0: [(0, 1)]})
    assert step.unseeing.tolist() == [0, 1]
    assert step.sequences("keyless").rows.tolist() == [2, 3]
