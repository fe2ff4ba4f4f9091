"""Shares of pictures, and where their kept tokens stand."""

from __future__ import annotations

import pytest
import torch

from dop_compile import Policy
from dop_compile.errors import UnsupportedUsageError
from dop_compile.plugins.vllm.positions import Placed, columns, pack, unpack
from dop_compile.plugins.vllm.selection import Selector
from dop_compile.plugins.vllm.shares import Layout, Share, shares_of
from dop_compile.reducers import VisualContext, create, select_tokens

POLICY = Policy.depthwise(4, visual_tokens=10)


def test_pictures_share_in_proportion_and_newlines_are_not_counted() -> None:
    shares = shares_of(10, [Layout(30), Layout(10 + 2 * 6, rows=2, columns=5)])
    assert [(share.number, share.count, share.kept) for share in shares] == [(0, 6, 6), (1, 4, 6)]
    assert Share.from_tensor(shares[1].to_tensor()) == shares[1]
    with pytest.raises(UnsupportedUsageError, match="picture 2 of 2 would have none"):
        shares_of(1, [Layout(30), Layout(20)])


@pytest.mark.parametrize(("reducer", "options"), [("uniform", {}), ("random", {"seed": 5}), ("divprune", {})])
def test_a_prompts_pictures_keep_what_the_product_keeps(reducer: str, options: dict[str, int]) -> None:
    """`select_tokens` of the whole prompt, by its own quotas."""
    sizes = [30, 20]
    features = torch.randn(sum(sizes), 8, generator=torch.Generator().manual_seed(0))
    segments = torch.repeat_interleave(torch.arange(2), torch.tensor(sizes))
    context = VisualContext(features, torch.zeros(0, 8), segments, 0)
    wanted = select_tokens(create(reducer, options), context, 11).indices.sort().values
    selector = Selector(POLICY.replace(reducer=reducer, reducer_options=tuple(options.items())))
    found, first = [], 0
    for share in shares_of(11, [Layout(size) for size in sizes]):
        own = features[first : first + share.layout.tokens]
        kept = selector.choose(share, own, None, None) if selector.reads_values else selector.fixed(share)
        found.append(kept + first)
        first += share.layout.tokens
    assert torch.cat(found).tolist() == wanted.tolist()


def test_newlines_always_enter() -> None:
    share = Share(0, 3, Layout(4 + 2 * 3, rows=2, columns=2))
    kept = Selector(POLICY).fixed(share).tolist()
    assert {6, 9} <= set(kept)
    assert len(kept) == 5


def test_kept_tokens_keep_their_places() -> None:
    """A prompt t P P t P t of pictures that had 5 and 3 tokens."""
    pictures = [
        Placed(torch.tensor([1, 2]), 5, torch.tensor([1, 4])),
        Placed(torch.tensor([4]), 3, torch.tensor([2])),
    ]
    found, firsts, length = columns(6, pictures)
    assert (found.tolist(), firsts, length) == ([0, 2, 5, 6, 9, 10], [1, 7], 11)
    unknown, _, _ = columns(6, [Placed(p.rows, p.tokens, None) for p in pictures])
    assert unknown.tolist() == [0, 1, 1, 6, 7, 10]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_offsets_travel_exactly(dtype: torch.dtype) -> None:
    offsets = torch.tensor([[0, 127, 128, 16383], [1, 2, 300, 9000], [5, 255, 257, 12345]])
    features, found = unpack(pack(torch.randn(4, 8).to(dtype), offsets))
    assert found.tolist() == offsets.tolist()
    assert features.shape == (4, 8)
    with pytest.raises(ValueError, match="more than 16384 positions"):
        pack(torch.zeros(1, 8), torch.tensor([[16384]] * 3))
