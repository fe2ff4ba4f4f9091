"""A layer's mask against a dense boolean mask written out by hand: padding, windows, a past, boolean and additive."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dop_compile.runtime.entries import Entries
from dop_compile.runtime.layout import NO_TOKEN, TokenLayout
from dop_compile.runtime.masks import MaskSelector
from dop_compile.tokens import TokenSet, Universe

GROUPS = ("system", "visual", "text")
UNIVERSE = Universe(GROUPS)
CPU = torch.device("cpu")
SETS = [TokenSet(frozenset(a for i, a in enumerate(UNIVERSE.atoms) if bits >> i & 1), UNIVERSE) for bits in range(8)]


def _dense(codes: Tensor, window: int | None) -> Tensor:
    """(batch, 1, slots, slots) bool: causal, no padding as key, at most `window` slots back."""
    slots = torch.arange(codes.shape[1])
    mask = (slots[None, :] <= slots[:, None]).expand(len(codes), -1, -1)
    if window is not None:
        mask = mask & (slots[None, :] > slots[:, None] - window)
    return (mask & (codes >= 0)[:, None, :])[:, None]


@st.composite
def codes_of(draw: st.DrawFn, padding: bool = True) -> Tensor:
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    rows = []
    for _ in range(batch):
        pad = draw(st.integers(0, length - 1)) if padding else 0
        tokens = draw(st.lists(st.integers(0, 2), min_size=length - pad, max_size=length - pad))
        rows.append([NO_TOKEN] * pad + tokens if draw(st.booleans()) else tokens + [NO_TOKEN] * pad)
    return torch.tensor(rows)


def _layout(codes: Tensor) -> TokenLayout:
    return TokenLayout(UNIVERSE, codes, codes >= 0, CPU)


def _members(codes: Tensor, tokens: TokenSet) -> Tensor:
    return torch.tensor([[tokens.is_all or (code >= 0 and any(a.group == GROUPS[code] for a in tokens.atoms))
                          for code in row] for row in codes.tolist()])  # fmt: skip


def _visible(mask: Tensor | None, shape: tuple[int, int, int, int]) -> Tensor:
    if mask is None:
        queries, keys = shape[2:]
        return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand(shape)
    return (mask if mask.dtype == torch.bool else mask == 0).expand(shape)


def _check_rows(
    selected: Tensor | None, visible: Tensor | None, dense: Tensor, layout: TokenLayout, queries: TokenSet,
    columns: list[list[int | None]],
) -> None:  # fmt: skip
    """Each query's row holds the dense mask's value for every stored entry, and False where an entry is padding."""
    slots, valid = layout.slots(queries)
    batch, width = slots.shape
    offset = dense.shape[-1] - layout.length
    grid = _visible(selected, (batch, 1, width, len(columns[0])))
    for row in range(batch):
        for position in range(width):
            if not valid[row, position] or layout.codes[row, slots[row, position]] == NO_TOKEN:
                continue
            wanted = [c is not None and bool(dense[row, 0, offset + slots[row, position], c]) for c in columns[row]]
            assert grid[row, 0, position].tolist() == wanted
            if visible is not None:
                assert bool(visible[row, position]) == any(wanted)
            else:
                assert any(wanted)


def _columns(layout: TokenLayout, keys: TokenSet, offset: int = 0) -> list[list[int | None]]:
    slots, valid = layout.slots(keys)
    return [[offset + s if v else None for s, v in zip(a, b, strict=True)]
            for a, b in zip(slots.tolist(), valid.tolist(), strict=True)]  # fmt: skip


@given(codes_of(), st.sampled_from(SETS), st.sampled_from(SETS), st.none() | st.integers(1, 4), st.booleans())
def test_prefill_with_the_models_mask(
    codes: Tensor, queries: TokenSet, keys: TokenSet, window: int | None, additive: bool
) -> None:
    layout, dense = _layout(codes), _dense(codes, window)
    mask = torch.where(dense, 0.0, torch.finfo(torch.float32).min) if additive else dense
    selected, visible = MaskSelector(layout, {}, 0).select(mask, 0, queries, keys)
    if queries.is_all and keys.is_all:
        assert selected is mask
        return
    assert selected is not None
    assert selected.dtype == mask.dtype
    _check_rows(selected, visible, dense, layout, queries, _columns(layout, keys))


@given(codes_of(padding=False), st.sampled_from(SETS), st.sampled_from(SETS))
def test_prefill_without_a_mask_is_causal(codes: Tensor, queries: TokenSet, keys: TokenSet) -> None:
    layout = _layout(codes)
    selected, visible = MaskSelector(layout, {}, 0).select(None, 0, queries, keys)
    if queries.is_all and keys.is_all:
        assert (selected, visible) == (None, None)
    elif selected is None and visible is None and queries == keys:
        assert all(bool(layout.slots(keys)[1].all()) for _ in "a"), "without padding inside the grid"
        _check_rows(None, None, _dense(codes, None), layout, queries, _columns(layout, keys))
    elif selected is not None:
        _check_rows(selected, visible, _dense(codes, None), layout, queries, _columns(layout, keys))


@given(
    codes_of(padding=False), st.sampled_from(SETS), st.sampled_from(SETS), st.sampled_from(SETS), st.integers(1, 3),
    st.booleans(),
)  # fmt: skip
def test_a_second_turn_sees_what_the_layer_stored(
    first: Tensor, stored: TokenSet, queries: TokenSet, keys: TokenSet, new: int, with_mask: bool
) -> None:
    past_layout = _layout(first)
    batch, past = first.shape
    before = MaskSelector(past_layout, {}, 0).entries(0, stored)
    codes = torch.arange(batch * new).view(batch, new) % 3
    layout = _layout(codes)
    dense = _dense(torch.cat([first, codes], dim=1), None)
    mask = dense[:, :, past:] if with_mask else None
    selector = MaskSelector(layout, {0: before}, past)
    selected, visible = selector.select(mask, 0, queries, keys)
    columns = [
        old + added for old, added in zip(_columns(past_layout, stored), _columns(layout, keys, past), strict=True)
    ]
    assert selector.entries(0, keys).count == len(columns[0])
    if queries.is_all and stored.is_all and keys.is_all:
        assert selected is mask
    elif selected is not None:
        _check_rows(selected, visible, dense, layout, queries, columns)
    else:
        assert new == 1, "one query that sees every entry needs no mask"
        assert all(column is not None for row in columns for column in row)


def test_layers_with_equal_sets_and_pasts_share_one_mask() -> None:
    codes = torch.tensor([[0, 1, 1, 2]])
    visual = UNIVERSE.groups_set(["visual"])
    selector, mask = MaskSelector(_layout(codes), {}, 0), _dense(codes, None)
    first, second = (selector.select(mask, layer, UNIVERSE.all - visual, UNIVERSE.all)[0] for layer in (0, 1))
    assert first is second
    other = selector.select(mask, 2, UNIVERSE.all - visual, visual)[0]
    assert other is not first


def test_layers_with_different_pasts_do_not() -> None:
    codes = torch.tensor([[2]])
    pasts = {0: Entries(3), 1: Entries(2, torch.tensor([[0, 2]]))}
    selector = MaskSelector(_layout(codes), pasts, 3)
    mask = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    assert selector.select(mask, 0, UNIVERSE.all, UNIVERSE.all)[0] is mask
    narrowed = selector.select(mask, 1, UNIVERSE.all, UNIVERSE.all)[0]
    assert narrowed is not None
    assert narrowed.shape[-1] == 3


def test_a_query_without_keys_is_told() -> None:
    codes = torch.tensor([[0, 1, 2]])
    visual = UNIVERSE.groups_set(["visual"])
    _, visible = MaskSelector(_layout(codes), {}, 0).select(None, 0, UNIVERSE.all, visual)
    assert visible is not None
    assert visible.tolist() == [[False, True, True]]
