"""Tokens named by the caller."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dop_compile.reducers import GivenReducer, VisualContext, select_tokens


def context(tokens, sample=0, segments=None):
    ids = torch.zeros(tokens, dtype=torch.long) if segments is None else torch.tensor(segments)
    return VisualContext(torch.zeros(tokens, 2), torch.zeros(1, 2), ids, sample)


@given(st.lists(st.lists(st.integers(0, 5), unique=True), min_size=1))
def test_each_sample_gets_its_own_indices_in_the_order_given(rows):
    reducer = GivenReducer(rows)
    assert reducer.counts == tuple(map(len, rows))
    for sample, row in enumerate(rows):
        assert reducer(context(6, sample), len(row)).indices.tolist() == row


@pytest.mark.parametrize(
    "indices",
    [[[3, 1]], ((3, 1),), [torch.tensor([3, 1])], torch.tensor([[3, 1]])],
)
def test_rows_may_be_sequences_or_tensors(indices):
    assert GivenReducer(indices) == GivenReducer([[3, 1]])
    assert GivenReducer(indices)(context(4), 2).indices.tolist() == [3, 1]


def test_indices_count_across_all_images_and_ignore_their_shares():
    reducer = GivenReducer([[5, 4, 0]])
    chosen = select_tokens(reducer, context(6, segments=[0, 0, 0, 1, 1, 1]), 3)
    assert chosen.indices.tolist() == [5, 4, 0]


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([[0], [2, 1, 2]], ValueError, "sample 1 name token 2 more than once"),
        ([[0, -1]], ValueError, "sample 0 must not be negative, but one is -1"),
        ([[0.0]], TypeError, r"sample 0 must be integers, not 0\.0"),
        ([[True]], TypeError, "sample 0 must be integers, not True"),
        ([torch.tensor([0.5])], TypeError, "sample 0 must be integers"),
        ([0, 1], TypeError, "sample 0 must be a sequence of integers, not 0"),
        (torch.tensor([0, 1]), TypeError, r"sample 0 must be a sequence of integers, not tensor\(0\)"),
        (["01"], TypeError, "sample 0 must be a sequence of integers, not '01'"),
        ("01", TypeError, "one sequence per sample, not str"),
        (7, TypeError, "one sequence per sample, not int"),
    ],
)
def test_indices_that_make_no_sense_are_refused_at_once(indices, error, message):
    with pytest.raises(error, match=f"reducer 'given': .*{message}"):
        GivenReducer(indices)


@pytest.mark.parametrize(
    ("sample", "count", "message"),
    [
        (2, 1, "indices for 2 samples, none for sample 2"),
        (0, 1, "2 indices for sample 0, but 1 of its 4 visual tokens are to be kept; give exactly 1"),
        (0, 3, "2 indices for sample 0, but 3 of its 4"),
        (1, 1, "index 4 for sample 1, which has only 4 visual tokens"),
    ],
)
def test_indices_that_do_not_fit_the_sample_are_refused(sample, count, message):
    with pytest.raises(ValueError, match=f"reducer 'given': {message}"):
        GivenReducer([[0, 1], [4]])(context(4, sample), count)
