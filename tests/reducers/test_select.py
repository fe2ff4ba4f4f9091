"""Applying a reducer to a sample, and checking what it returns."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dop_compile.reducers import (
    RandomReducer,
    Selection,
    UniformReducer,
    VisualContext,
    quotas,
    select_tokens,
)


def context(sizes, dtype=torch.float32, order=None, **optional):
    """A sample whose token i has the features (i, i)."""
    segments = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.long))
    if order is not None:
        segments = segments[order]
    tokens = len(segments)
    projected = torch.arange(tokens, dtype=dtype)[:, None].expand(tokens, 2).contiguous()
    return VisualContext(projected, torch.zeros(3, 2, dtype=dtype), segments, 0, **optional)


@dataclass
class Canned:
    """Returns what it was made with; calls are recorded."""

    answer: Any
    name = "canned"
    requires = frozenset()

    def __post_init__(self):
        self.calls = []

    def __call__(self, context, count):
        self.calls.append((context, count))
        return self.answer(context, count) if callable(self.answer) else self.answer


def first(context, count):
    return Selection(torch.arange(count))


# --- what comes out -----------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=6),
    st.integers(0, 200),
    st.sampled_from([UniformReducer(), RandomReducer(3)]),
    st.randoms(use_true_random=False),
)
def test_each_image_keeps_its_quota_of_distinct_tokens(sizes, count, reducer, shuffler):
    order = list(range(sum(sizes)))
    shuffler.shuffle(order)  # segments need not be contiguous
    sample = context(sizes, order=order)
    chosen = select_tokens(reducer, sample, count)
    assert chosen.indices.dtype == torch.long
    assert len(set(chosen.indices.tolist())) == len(chosen.indices) == min(count, sum(sizes))
    per_segment = torch.bincount(sample.segments[chosen.indices], minlength=len(sizes)).tolist()
    assert per_segment == quotas(count, sizes)


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.data())
def test_a_prefix_of_the_ranking_holds_the_best_of_every_image(sizes, data):
    count = data.draw(st.integers(0, sum(sizes)))
    sample = context(sizes)
    ranked = sample.segments[select_tokens(UniformReducer(), sample, count).indices]
    shares = quotas(count, sizes)
    for prefix in range(count + 1):
        for segment, share in enumerate(shares):
            in_prefix = int((ranked[:prefix] == segment).sum())
            assert abs(in_prefix - share * prefix / max(count, 1)) <= len(sizes)


def test_merged_ranking_by_hand():
    # Image 0 keeps 4 at (1, 3, 5, 7) / 8; image 1 keeps 2 at (1, 3) / 4 = (2, 6) / 8.
    chosen = select_tokens(Canned(first), context([8, 4]), 6)
    assert chosen.indices.tolist() == [0, 8, 1, 2, 9, 3]
    # A single token stands in the middle, at 1 / 2: after the first of three, which stands at 1 / 6.
    assert select_tokens(Canned(first), context([3, 1]), 4).indices.tolist() == [0, 1, 3, 2]


def test_equal_relative_ranks_go_to_the_lower_image():
    assert select_tokens(Canned(first), context([2, 2, 2]), 6).indices.tolist() == [0, 2, 4, 1, 3, 5]


def test_one_image_keeps_the_reducers_order():
    reducer = Canned(Selection(torch.tensor([4, 0, 2])))
    assert select_tokens(reducer, context([5]), 3).indices.tolist() == [4, 0, 2]


@pytest.mark.parametrize(("sizes", "count"), [([3], 0), ([], 5), ([0], 5)])
def test_nothing_to_keep_does_not_ask_the_reducer(sizes, count):
    reducer = Canned(first)
    chosen = select_tokens(reducer, context(sizes), count)
    assert chosen.indices.shape == (0,)
    assert chosen.indices.dtype == torch.long
    assert reducer.calls == []


def test_an_image_without_a_share_is_not_asked_about():
    reducer = Canned(first)
    assert select_tokens(reducer, context([0, 9, 1]), 2).indices.tolist() == [0, 1]
    assert [(seen.segment_index, count) for seen, count in reducer.calls] == [(1, 2)]


def test_asking_for_more_than_there_are_keeps_all():
    reducer = Canned(first)
    assert select_tokens(reducer, context([3]), 100).indices.tolist() == [0, 1, 2]
    assert [count for _, count in reducer.calls] == [3]


def test_replacement_features_and_positions_stay_with_their_tokens():
    def second_image_merges(context, count):
        indices = torch.arange(count).flip(0)
        if context.segment_index == 0:
            return Selection(indices)
        return Selection(indices, context.projected[indices] + 100, torch.zeros_like(indices))

    sample = context([4, 2])
    chosen = select_tokens(Canned(second_image_merges), sample, 6)
    merged = sample.segments[chosen.indices] == 1
    assert merged.sum() == 2
    expected = sample.projected[chosen.indices] + 100 * merged[:, None]
    assert torch.equal(chosen.features, expected)
    assert torch.equal(chosen.positions, torch.where(merged, 4, chosen.indices))


# --- what the reducer is given ------------------------------------------------------------------------


def test_a_reducer_sees_one_image_at_a_time():
    attention = torch.arange(5.0)
    sample = context(
        [3, 2], features=torch.arange(10.0).view(5, 2), cls_attention=attention, grid=[(1, 1, 3), (1, 1, 2)]
    )
    reducer = Canned(first)
    select_tokens(reducer, sample, 5)
    (left, _), (right, _) = reducer.calls
    assert (left.segment_index, right.segment_index) == (0, 1)
    assert (list(left.grid), list(right.grid)) == ([(1, 1, 3)], [(1, 1, 2)])
    assert right.cls_attention.tolist() == [3, 4]
    assert torch.equal(right.features, sample.features[3:])
    assert torch.equal(right.projected, sample.projected[3:])
    assert right.segments.tolist() == [0, 0]
    assert right.text is sample.text


def test_a_whole_sample_reducer_sees_all_images_at_once():
    reducer = Canned(Selection(torch.tensor([4, 3])))
    reducer.whole_sample = True
    sample = context([3, 2])
    assert select_tokens(reducer, sample, 2).indices.tolist() == [4, 3]
    assert reducer.calls == [(sample, 2)]


@pytest.mark.parametrize("field", ["features", "cls_attention", "grid"])
def test_a_required_field_must_be_there(field):
    reducer = Canned(first)
    reducer.requires = frozenset({field})
    with pytest.raises(ValueError, match=f"reducer 'canned' requires {field}, which this model does not"):
        select_tokens(reducer, context([4]), 2)
    present = {"features": torch.zeros(4, 3), "cls_attention": torch.zeros(4), "grid": [(1, 2, 2)]}
    select_tokens(reducer, context([4], **{field: present[field]}), 2)


def test_a_requirement_that_no_context_has_is_named():
    reducer = Canned(first)
    reducer.requires = frozenset({"attention_maps"})
    with pytest.raises(ValueError, match=r"requires attention_maps, which no context has; known are .*grid"):
        select_tokens(reducer, context([4]), 2)


def test_bad_arguments_of_the_caller():
    with pytest.raises(ValueError, match="cannot keep -1 visual tokens"):
        select_tokens(UniformReducer(), context([4]), -1)
    with pytest.raises(ValueError, match="grid must have an entry for each of 2 segments, not 1"):
        select_tokens(UniformReducer(), context([2, 2], grid=[(1, 1, 2)]), 2)
    negative = VisualContext(torch.zeros(2, 2), torch.zeros(0, 2), torch.tensor([0, -1]), 0)
    with pytest.raises(ValueError, match="segments must not be negative"):
        select_tokens(UniformReducer(), negative, 1)


# --- what the reducer may not return ------------------------------------------------------------------

TWO = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (TWO, TypeError, "must return a Selection, not Tensor"),
        (Selection([0, 1]), TypeError, "indices must be a tensor, not list"),
        (Selection(torch.tensor([1, 1])), ValueError, "indices contain 1 more than once"),
        (Selection(torch.tensor([0, 4])), ValueError, "indices contain 4, out of range for 4 visual tokens"),
        (Selection(torch.tensor([-1, 0])), ValueError, "indices contain -1, out of range"),
        (Selection(torch.tensor([0, 1, 2])), ValueError, r"indices must have shape \(2,\).*not \(3,\)"),
        (Selection(torch.tensor([0])), ValueError, r"indices must have shape \(2,\).*not \(1,\)"),
        (Selection(torch.tensor([[0, 1]])), ValueError, r"indices must have shape \(2,\).*not \(1, 2\)"),
        (Selection(torch.tensor([0.0, 1.0])), ValueError, r"indices must be int64, not torch\.float32"),
        (Selection(torch.tensor([True, False])), ValueError, r"indices must be int64, not torch\.bool"),
        (Selection(TWO, positions=torch.tensor([0, 4])), ValueError, "positions contain 4, out of range"),
        (Selection(TWO, positions=torch.tensor([0])), ValueError, r"positions must have shape \(2,\)"),
        (Selection(TWO, positions=[0, 1]), TypeError, "positions must be a tensor, not list"),
        (Selection(TWO, [[0.0] * 2] * 2), TypeError, "features must be a tensor, not list"),
        (Selection(TWO, torch.zeros(2, 3)), ValueError, r"features must have shape \(2, 2\), not \(2, 3\)"),
        (
            Selection(TWO, torch.zeros(2, 2, dtype=torch.float16)),
            ValueError,
            r"features must be torch\.float32 on cpu, as `projected` is, not torch\.float16 on cpu",
        ),
        (Selection(TWO, torch.tensor([[0, float("nan")], [0, 0]])), ValueError, "features contain NaN"),
    ],
)
@pytest.mark.parametrize("sizes", [[4], [4, 4]], ids=["one image", "two images"])
def test_a_wrong_answer_is_refused_with_the_reducers_name(answer, error, message, sizes):
    with pytest.raises(error, match=f"^reducer 'canned':? {message}"):
        select_tokens(Canned(answer), context(sizes), 2 * len(sizes))


def test_nan_that_the_reducer_was_given_passes_through():
    sample = context([4])
    sample.projected[3] = float("nan")
    reducer = Canned(lambda context, count: Selection(TWO, context.projected[2:]))
    assert select_tokens(reducer, sample, 2).features.isnan().any()


@pytest.mark.parametrize("reducer", [UniformReducer(), RandomReducer()])
def test_nan_and_half_precision_are_nothing_to_the_controls(reducer):
    clean = select_tokens(reducer, context([5, 7]), 6)
    dirty = context([5, 7], dtype=torch.bfloat16)
    dirty.projected.fill_(float("nan"))
    assert torch.equal(select_tokens(reducer, dirty, 6).indices, clean.indices)
    assert clean.features is clean.positions is None
