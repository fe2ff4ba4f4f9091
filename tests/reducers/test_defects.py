"""Defects of public implementations that must not occur here."""

from __future__ import annotations

import pytest
import torch

from dop_compile.reducers import VisualContext, create, quotas, select_tokens


def context(tokens: int = 64, segments: list[int] | None = None, tiles: list[int] | None = None, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(tokens, 16, generator=generator)
    weight = torch.randn(16, 8, generator=generator)
    zeros = torch.zeros(tokens, dtype=torch.long)
    return VisualContext(
        projected=features @ weight,
        text=torch.randn(5, 8, generator=generator),
        segments=zeros if segments is None else torch.tensor(segments),
        sample_index=0,
        features=features,
        cls_attention=torch.rand(tokens, generator=generator),
        keys=torch.randn(tokens, 6, generator=generator),
        project=lambda merged: merged @ weight,
        tiles=zeros if tiles is None else torch.tensor(tiles),
    )


@pytest.mark.parametrize("count", [*range(18), 33, 63, 64])
def test_vispruner_with_odd_and_small_parts(count):
    """The public code fails for an odd number of important tokens, and for fewer than 8 diverse ones."""
    kept = select_tokens(create("vispruner"), context(), count).indices
    assert len(kept) == count
    attention = context().cls_attention
    assert set(kept[: count // 2].tolist()) == set(attention.topk(count // 2).indices.tolist())


@pytest.mark.parametrize("share", [0.3, 0.34, 0.5, 0.75, 0.99])
def test_prumerge_plus_above_a_third(share):
    """The public code's stride becomes zero there."""
    count = int(share * 64)
    assert len(select_tokens(create("prumerge_plus"), context(), count).indices) == count


def test_outliers_are_counted_per_image():
    """The public code takes quartiles over the whole batch."""
    sample = context(128, segments=[0] * 64 + [1] * 64)
    attention = torch.rand(128, generator=torch.Generator().manual_seed(1))
    attention[64:] *= 100
    attention[5] = 10.0  # an outlier of the first image alone
    sample = VisualContext(**{**vars(sample), "cls_attention": attention})
    chosen = select_tokens(create("prumerge", {"adaptive": True}), sample, 128)
    per_image = torch.bincount(sample.segments[chosen.indices], minlength=2).tolist()
    assert per_image == [2, 1]  # its outlier and the merged rest; the merged rest
    assert 5 in chosen.indices


@pytest.mark.parametrize(("value", "outliers"), [(3.45, 0), (3.5, 0), (3.55, 1)])
def test_an_outlier_lies_one_and_a_half_ranges_above_the_third_quartile(value, outliers):
    """Quartiles 1 and 2: the limit is 2 + 1.5."""
    attention = torch.tensor([0.0, 1.0, 1.0, 1.5, 1.5, 1.5, 2.0, 2.0, value])
    sample = context(9)
    sample = VisualContext(**{**vars(sample), "cls_attention": attention})
    assert len(select_tokens(create("prumerge", {"adaptive": True}), sample, 9).indices) == outliers + 1


@pytest.mark.parametrize("name", ["vispruner", "visionzip", "prumerge", "prumerge_plus"])
def test_the_highest_attention_is_kept(name):
    sample = context()
    assert int(sample.cls_attention.argmax()) == select_tokens(create(name), sample, 12).indices[0]


@pytest.mark.parametrize("name", ["cdpruner", "trim"])
def test_the_most_relevant_is_kept(name):
    sample = context()
    mean = sample.text.mean(0)
    relevance = torch.nn.functional.cosine_similarity(sample.projected, mean[None])
    assert int(relevance.argmax()) == select_tokens(create(name), sample, 12).indices[0]


@pytest.mark.parametrize("name", ["vispruner", "cdpruner", "visionzip", "prumerge", "prumerge_plus"])
@pytest.mark.parametrize("count", [1, 7, 20, 63])
def test_tiles_share_the_budget(name, count):
    """Tiles of different sizes, one inside the other's raster, as unpadded tiles of LLaVA-NeXT are."""
    tiles = [0] * 24 + [1, 1, 2, 2] * 8 + [3] * 8
    sample = context(tiles=tiles)
    kept = select_tokens(create(name), sample, count).indices
    assert torch.bincount(sample.tiles[kept], minlength=4).tolist() == quotas(count, [24, 16, 16, 8])


@pytest.mark.parametrize("name", ["vispruner", "visionzip", "prumerge", "prumerge_plus"])
def test_a_tile_is_reduced_as_an_image_of_its_own(name):
    sample = context(tiles=[0, 1] * 32)
    together = select_tokens(create(name), sample, 24)
    for tile in (0, 1):
        members = (sample.tiles == tile).nonzero()[:, 0]
        fields = ("projected", "segments", "features", "cls_attention", "keys")
        alone = VisualContext(
            **{**vars(sample), "tiles": torch.zeros(32, dtype=torch.long)}
            | {field: getattr(sample, field)[members] for field in fields}
        )
        expected = select_tokens(create(name), alone, 12)
        mine = sample.tiles[together.indices] == tile
        assert together.indices[mine].tolist() == members[expected.indices].tolist()
        if expected.features is not None:
            torch.testing.assert_close(together.features[mine], expected.features)


def test_relevance_is_scaled_over_all_tiles_of_an_image():
    """Scaled tile by tile, the second tile's tokens would count as much as the first's."""
    sample = context(tiles=[0] * 32 + [1] * 32)
    (prepared,) = create("cdpruner").prepare([sample])
    mean = sample.text.mean(0)
    cosine = torch.nn.functional.cosine_similarity(sample.projected, mean[None])
    expected = (cosine - cosine.min() + 1e-6) / (cosine.max() - cosine.min())
    torch.testing.assert_close(prepared.relevance, expected, rtol=1e-4, atol=1e-5)


def test_relevance_needs_a_text():
    silent = VisualContext(**{**vars(context()), "text": torch.zeros(0, 8)})
    for name in ("cdpruner", "trim"):
        with pytest.raises(ValueError, match=r"sample 0 has no token besides its images; choose.*'vispruner'"):
            select_tokens(create(name), silent, 4)
