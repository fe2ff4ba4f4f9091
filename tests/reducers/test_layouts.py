"""Every reducer that is known by name, on several images or frames, of several tiles, at any number of tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dop_compile.reducers import VisualContext, create, known, quotas, select_batch, select_tokens
from tests.drawing import examples
from tests.reducers.drawn import HIDDEN, VISION, contexts

CHOSEN_ELSEWHERE = {"given", "resize"}
"""The caller's own choice over all images, and no choice at all: `test_given`, `test_resize`."""
ALIKE_EVERYWHERE = {"random"}
"""Draws apart for each sample and image, so that an image's share depends on where it stands: `test_random`."""
drawn = examples(15)
NAMES = sorted(set(known()) - CHOSEN_ELSEWHERE)
SETTINGS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in NAMES]
SETTINGS += [("prumerge", {"adaptive": True}), ("prumerge_plus", {"adaptive": True})]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[VisualContext, list[int]]:
    """Images one after the other, each a grid of one or more frames or tiles, and their sizes."""
    tile_sizes = draw(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=4))
    sizes = [sum(image) for image in tile_sizes]
    context = draw(contexts(tokens=sum(sizes)))
    segments = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    tiles = torch.cat([torch.repeat_interleave(torch.arange(len(image)), torch.tensor(image)) for image in tile_sizes])
    grid = tuple((1, 1, size) for size in sizes) if draw(st.booleans()) else None
    return replace(context, segments=segments, tiles=tiles, grid=grid), sizes


@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=lambda value: value if isinstance(value, str) else "")
@drawn
@given(layout=layouts(), data=st.data())
def test_every_image_and_tile_has_its_share(name: str, options: dict[str, Any], layout: Any, data: Any) -> None:
    context, sizes = layout
    count = data.draw(st.integers(0, context.tokens))
    reducer = create(name, options)
    chosen = select_tokens(reducer, context, count)
    kept = chosen.indices.tolist()
    assert len(set(kept)) == len(kept)
    assert all(0 <= token < context.tokens for token in kept)
    of_image = [int((context.segments[kept] == image).sum()) for image in range(len(sizes))]
    shares = quotas(count, sizes)
    if getattr(reducer, "at_most", False):
        assert all(own <= share for own, share in zip(of_image, shares, strict=True))
    else:
        assert of_image == shares
    if chosen.features is not None:
        assert chosen.features.shape == (len(kept), context.projected.shape[1])
    if getattr(reducer, "per_tile", False) and not options:
        for image, share in enumerate(shares):
            own = context.segments == image
            tiles = torch.bincount(context.tiles[own]).tolist()
            found = [int((own & (context.tiles == tile))[kept].sum()) for tile in range(len(tiles))]
            assert found == quotas(share, tiles)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ALIKE_EVERYWHERE])
@drawn
@given(layout=layouts(), data=st.data())
def test_an_image_among_others_is_reduced_as_if_alone(name: str, layout: Any, data: Any) -> None:
    context, sizes = layout
    count = data.draw(st.integers(0, context.tokens))
    kept = select_tokens(create(name), context, count).indices.tolist()
    for image, share in enumerate(quotas(count, sizes)):
        own = (context.segments == image).nonzero().squeeze(1)
        fields = ("projected", "segments", "features", "cls_attention", "keys", "tiles")
        alone = {field: getattr(context, field)[own] for field in fields}
        alone["segments"] = torch.zeros_like(own)
        single = replace(context, **alone, grid=None if context.grid is None else (context.grid[image],))
        expected = own[select_tokens(create(name), single, share).indices].tolist()
        assert [token for token in kept if token in own.tolist()] == expected


@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=lambda value: value if isinstance(value, str) else "")
@drawn
@given(samples=st.lists(layouts(), min_size=2, max_size=3), data=st.data())
def test_a_batch_of_layouts_is_its_samples(name: str, options: dict[str, Any], samples: Any, data: Any) -> None:
    weight = torch.ones(VISION, HIDDEN)  # one projector for all, as in a model
    given_contexts = [
        replace(context, sample_index=number, project=lambda merged: merged @ weight)
        for number, (context, _) in enumerate(samples)
    ]
    counts = [data.draw(st.integers(0, context.tokens)) for context in given_contexts]
    reducer = create(name, options)
    together = select_batch(reducer, given_contexts, counts)
    for context, count, found in zip(given_contexts, counts, together, strict=True):
        alone = select_tokens(reducer, context, count)
        assert found.indices.tolist() == alone.indices.tolist()
        assert (found.features is None) == (alone.features is None)
        if found.features is not None and alone.features is not None:
            torch.testing.assert_close(found.features, alone.features, rtol=1e-5, atol=1e-5)
