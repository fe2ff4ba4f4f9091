"""The random control."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dop_compile.reducers import RandomReducer, VisualContext


def context(tokens, sample=0, segment=0, content=0.0):
    return VisualContext(
        torch.full((tokens, 2), content),
        torch.full((3, 2), content),
        torch.zeros(tokens, dtype=torch.long),
        sample_index=sample,
        segment_index=segment,
    )


def kept(reducer, *args, count, **kwargs):
    return reducer(context(*args, **kwargs), count).indices.tolist()


@given(st.integers(0, 100), st.data(), st.integers(-(2**70), 2**70))
def test_keeps_distinct_tokens_and_a_smaller_count_keeps_a_prefix(tokens, data, seed):
    count = data.draw(st.integers(0, tokens))
    everything = kept(RandomReducer(seed), tokens, count=tokens)
    assert sorted(everything) == list(range(tokens))
    assert kept(RandomReducer(seed), tokens, count=count) == everything[:count]


@given(st.integers(0, 9), st.floats(allow_nan=False, width=32), st.integers(0, 2**32))
def test_a_row_selects_the_same_wherever_it_stands_and_whatever_it_shows(sample, content, global_seed):
    torch.manual_seed(global_seed)
    before = torch.random.get_rng_state()
    assert kept(RandomReducer(5), 40, count=7, sample=sample, content=content) == kept(RandomReducer(5), 40, count=7)
    assert torch.equal(torch.random.get_rng_state(), before), "the global generator was advanced"


def test_seed_size_and_segment_all_change_the_draw():
    draws = {
        tuple(kept(RandomReducer(seed), tokens, count=20, segment=segment))
        for seed in (0, 1, 2)
        for tokens in (100, 101, 102)
        for segment in (0, 1, 2)
    }
    assert len(draws) == 27


def test_every_token_is_as_likely():
    hits = torch.zeros(8)
    for seed in range(2000):
        hits[kept(RandomReducer(seed), 8, count=2)] += 1
    # 500 expected of each; the standard deviation is 19.4.
    assert (hits - 500).abs().max() < 100


@pytest.mark.parametrize("seed", [1.0, "1", True, None])
def test_a_seed_that_is_no_integer_is_refused(seed):
    with pytest.raises(TypeError, match=r"reducer 'random': seed must be an integer"):
        RandomReducer(seed)
