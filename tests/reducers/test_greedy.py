"""Greedy choices, compiled and at their limits."""

from __future__ import annotations

import functools

import pytest
import torch

from dop_compile.reducers import greedy
from dop_compile.reducers.greedy import farthest_points, greedy_map
from dop_compile.reducers.numbers import cosine


def kernel(images: int = 3, tokens: int = 40, width: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return cosine(torch.randn(images, tokens, width, generator=generator)), torch.rand(
        images, tokens, generator=generator
    )


@pytest.mark.inductor
def test_compiled_steps_choose_the_same() -> None:
    similarity, quality = kernel()
    for count in (1, 7, 30):
        expected = greedy_map(similarity, quality, count, compiled=False)
        assert torch.equal(greedy_map(similarity, quality, count, compiled=True), expected)


def test_without_a_compiler_it_says_so_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no C compiler")

    compile = functools.partial(torch.compile, backend=broken)
    monkeypatch.setattr(greedy.torch, "compile", compile)
    monkeypatch.setattr(greedy, "_compiled_step", functools.cache(greedy._compiled_step.__wrapped__))
    similarity, quality = kernel()
    with pytest.warns(RuntimeWarning, match=r"(?s)runs uncompiled, and slower: .*no C compiler") as said:
        found = [greedy_map(similarity, quality, 7, compiled=True) for _ in range(2)]
    assert len(said) == 1
    assert torch.equal(found[0], greedy_map(similarity, quality, 7, compiled=False))
    assert torch.equal(*found)


def test_a_longer_choice_begins_with_the_shorter_one() -> None:
    similarity, quality = kernel()
    longest = greedy_map(similarity, quality, 40)
    far = farthest_points(1 - similarity, 40)
    for count in (0, 1, 12, 13, 39):  # beyond 12, the features' width, nothing is left to explain
        assert torch.equal(greedy_map(similarity, quality, count), longest[:, :count])
        assert torch.equal(farthest_points(1 - similarity, count), far[:, :count])
    for row in (*longest, *far):
        assert sorted(row.tolist()) == list(range(40))


def test_beyond_the_rank_the_lowest_indices_follow() -> None:
    similarity, quality = kernel(images=1, tokens=20, width=4)
    chosen = greedy_map(similarity, quality, 20)[0].tolist()
    assert chosen[4:] == sorted(chosen[4:])


def test_no_relevance_at_all() -> None:
    similarity, _ = kernel(images=1)
    assert greedy_map(similarity, torch.zeros(1, 40), 5).tolist() == [[0, 1, 2, 3, 4]]
