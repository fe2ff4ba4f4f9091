"""How images share the visual tokens of a sample."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dop_compile.reducers import quotas

SIZES = st.lists(st.integers(0, 1000), max_size=12)


@given(st.integers(0, 13000), SIZES)
def test_everything_is_given_out_and_nobody_gets_more_than_it_has(total, sizes):
    shares = quotas(total, sizes)
    assert len(shares) == len(sizes)
    assert sum(shares) == min(total, sum(sizes))
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))


@given(st.integers(0, 13000), SIZES.filter(any))
def test_largest_remainders_are_rounded_up_and_ties_go_to_the_lowest_index(total, sizes):
    total = min(total, sum(sizes))
    exact = [Fraction(total * size, sum(sizes)) for size in sizes]
    extra = [share - whole // 1 for share, whole in zip(quotas(total, sizes), exact, strict=True)]
    assert set(extra) <= {0, 1}
    up = [(-(whole % 1), index) for index, whole in enumerate(exact) if extra[index]]
    down = [(-(whole % 1), index) for index, whole in enumerate(exact) if not extra[index]]
    assert not up or not down or max(up) < min(down)


@pytest.mark.parametrize(
    ("total", "sizes", "shares"),
    [
        (4, [10, 10, 10], [2, 1, 1]),
        (97, [576], [97]),
        (10, [1, 1], [1, 1]),
        (3, [0, 100, 0, 50], [0, 2, 0, 1]),
        (1, [10, 30], [0, 1]),
        (0, [3, 4], [0, 0]),
        (5, [], []),
        (5, [0, 0], [0, 0]),
    ],
)
def test_by_hand(total, sizes, shares):
    assert quotas(total, sizes) == shares


@pytest.mark.parametrize(("total", "sizes"), [(-1, [3]), (2, [3, -1])])
def test_negative_numbers_are_refused(total, sizes):
    with pytest.raises(ValueError, match=r"cannot keep -1|must not be negative"):
        quotas(total, sizes)
