"""The evenly spaced control."""

from fractions import Fraction
from itertools import pairwise
from math import floor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dop_compile.reducers import UniformReducer, VisualContext


def context(tokens):
    return VisualContext(torch.zeros(tokens, 2), torch.zeros(1, 2), torch.zeros(tokens, dtype=torch.long), 0)


@st.composite
def tokens_and_count(draw):
    tokens = draw(st.integers(0, 600))
    return tokens, draw(st.integers(0, tokens))


@given(tokens_and_count())
def test_keeps_the_stride_of_the_definition(sizes):
    tokens, count = sizes
    kept = UniformReducer()(context(tokens), count).indices
    assert kept.dtype == torch.long
    expected = [floor((i + Fraction(1, 2)) * tokens / count) for i in range(count)]
    assert sorted(kept.tolist()) == expected


@pytest.mark.parametrize(
    ("tokens", "count", "ranked"),
    [
        (8, 8, [0, 4, 2, 6, 1, 5, 3, 7]),
        (576, 1, [288]),
        (10, 5, [1, 9, 5, 3, 7]),
        (5, 0, []),
        (0, 0, []),
    ],
)
def test_ranking_by_hand(tokens, count, ranked):
    assert UniformReducer()(context(tokens), count).indices.tolist() == ranked


@pytest.mark.parametrize("prefix", [2, 4, 8, 16, 32])
def test_a_prefix_of_the_ranking_is_spread_evenly(prefix):
    kept = sorted(UniformReducer()(context(64), 64).indices[:prefix].tolist())
    gaps = {right - left for left, right in pairwise(kept)}
    assert gaps == {64 // prefix}
