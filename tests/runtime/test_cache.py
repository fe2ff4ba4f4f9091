"""The pruned cache against a naive model of it: rows and layers that are lists of slots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache, StaticCache

from dop_compile.errors import UnsupportedUsageError
from dop_compile.runtime.cache import PrunedCache, ReducedView
from dop_compile.runtime.entries import Entries
from tests.drawing import examples

LAYERS = 3


@dataclass
class Row:
    """One conversation: the column of every slot (None for padding), per layer the slots stored (None for padding)."""

    name: int
    columns: list[int | None] = field(default_factory=list)
    layers: list[list[int | None]] = field(default_factory=lambda: [[] for _ in range(LAYERS)])


@dataclass
class Naive:
    rows: list[Row]
    seen: int = 0

    def select(self, indices: list[int]) -> None:
        self.rows = [Row(self.rows[i].name, list(self.rows[i].columns), [list(x) for x in self.rows[i].layers])
                     for i in indices]  # fmt: skip

    def empties_a_layer(self, keep: int) -> bool:
        def is_left(row: Row, slot: int | None) -> bool:
            column = None if slot is None else row.columns[slot]
            return column is not None and column < keep

        return any(
            not any(is_left(row, slot) for row in self.rows for slot in row.layers[layer]) for layer in range(LAYERS)
        )

    def crop(self, keep: int) -> None:
        for row in self.rows:
            alive = {slot for slot, column in enumerate(row.columns) if column is not None and column < keep}
            row.layers = [[slot for slot in layer if slot in alive] for layer in row.layers]
            row.columns = [column for column in row.columns if column is None or column < keep]
        slots = max(len(row.columns) for row in self.rows)
        for row in self.rows:
            row.columns += [None] * (slots - len(row.columns))
        self.seen = keep


def _key(name: int, column: int | None, layer: int) -> float:
    return -1.0 if column is None else name * 1000 + column * 10 + layer


def _extend(cache: PrunedCache, naive: Naive, keeps: list[list[bool]], stored: list[set[int]]) -> None:
    """A call of new columns: `keeps` per row which of them become slots, `stored` per layer which are keys.

    Slots are right-aligned like a left-padded batch; layers likewise.
    """
    count = len(keeps[0])
    rows = [[column for column in range(count) if keep[column]] for keep in keeps]
    slots = max(1, *(len(row) for row in rows))
    grid = [[None] * (slots - len(row)) + row for row in rows]
    whole = all(len(row) == count for row in rows)
    past = cache.slots_seen
    entries: dict[int, Entries] = {}
    for layer in range(LAYERS):
        chosen = [[s for s, c in enumerate(row) if c is not None and c in stored[layer]] for row in grid]
        all_stored = whole and len(stored[layer]) == count
        width = slots if all_stored else max(1, *(len(row) for row in chosen))
        padded = [[None] * (width - len(row)) + row for row in chosen]
        new_slots = None if all_stored else torch.tensor([[s or 0 for s in row] for row in padded])
        valid = torch.tensor([[s is not None for s in row] for row in padded])
        new_valid = None if bool(valid.all()) else valid
        entries[layer] = cache.entries.get(layer, Entries()).append(past, width, new_slots, new_valid)
        keys = torch.tensor([
            [_key(row.name, None if s is None else naive.seen + grid[i][s], layer) for s in padded[i]]  # type: ignore[operator]
            for i, row in enumerate(naive.rows)
        ])[:, None, :, None]  # fmt: skip
        cache.store(keys, keys.clone(), layer)
        for i, row in enumerate(naive.rows):
            row.layers[layer] += [past + s for s in padded[i] if s is not None]
    columns = None if whole else torch.tensor([[-1 if c is None else c for c in row] for row in grid])
    for i, row in enumerate(naive.rows):
        row.columns += [None if c is None else naive.seen + c for c in grid[i]]
    cache.commit(count, slots, columns, entries)
    naive.seen += count


def _check(cache: PrunedCache, naive: Naive) -> None:
    assert cache.get_seq_length() == cache.columns_seen == naive.seen
    for layer in range(LAYERS):
        entries = cache.entries[layer]
        stored = cache.layers[layer]
        assert stored.keys.shape[2] == entries.count  # type: ignore[union-attr]
        for i, row in enumerate(naive.rows):
            slots = list(range(entries.count)) if entries.slots is None else entries.slots[i].tolist()
            valid = [True] * entries.count if entries.valid is None else entries.valid[i].tolist()
            held = [slot for slot, ok in zip(slots, valid, strict=True) if ok]
            assert held == row.layers[layer]
            values = [k for k, ok in zip(stored.keys[i, 0, :, 0].tolist(), valid, strict=True) if ok]  # type: ignore[index]
            assert values == [_key(row.name, row.columns[slot], layer) for slot in held]
            if cache.columns is not None:
                found = cache.columns[i].tolist()
                assert [found[slot] for slot in held] == [row.columns[slot] for slot in held]


@st.composite
def turns(draw: st.DrawFn, batch: int) -> tuple[list[list[bool]], list[set[int]]]:
    count = draw(st.integers(1, 5))
    if draw(st.booleans()):
        keeps = [[True] * count for _ in range(batch)]
    else:
        keeps = [draw(st.lists(st.booleans(), min_size=count, max_size=count)) for _ in range(batch)]
    everything = set(range(count))
    layers = [everything if draw(st.booleans()) else draw(st.sets(st.integers(0, count - 1))) for _ in range(LAYERS)]
    return keeps, layers


OPERATIONS = ["turn", "reorder", "repeat", "select", "crop"]


@examples(150)
@given(st.data())
def test_everything_follows_what_generate_does_to_a_cache(data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 3))
    cache, naive = PrunedCache(), Naive([Row(name) for name in range(batch)])
    cache.conversation["rope_deltas"] = torch.arange(batch)[:, None]
    cache.position_shift = torch.arange(batch)[:, None]
    _extend(cache, naive, *data.draw(turns(batch)))
    for operation in data.draw(st.lists(st.sampled_from(OPERATIONS), max_size=4)):
        rows = len(naive.rows)
        if operation == "turn":
            _extend(cache, naive, *data.draw(turns(rows)))
        elif operation == "reorder":
            order = data.draw(st.permutations(range(rows)))
            cache.reorder_cache(torch.tensor(order))
            naive.select(list(order))
        elif operation == "repeat" and rows <= 3:
            cache.batch_repeat_interleave(2)
            naive.select([i for i in range(rows) for _ in range(2)])
        elif operation == "select":
            chosen = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=3))
            cache.batch_select_indices(torch.tensor(chosen))
            naive.select(chosen)
        elif operation == "crop":
            keep = data.draw(st.integers(1, naive.seen))
            if naive.empties_a_layer(keep):
                continue  # see the test below
            cache.crop(keep if data.draw(st.booleans()) else keep - naive.seen)
            naive.crop(keep)
        _check(cache, naive)
        names = [row.name for row in naive.rows]
        assert cache.conversation["rope_deltas"][:, 0].tolist() == names
        assert cache.position_shift[:, 0].tolist() == names


def test_a_layer_emptied_by_crop_still_follows() -> None:
    cache, naive = PrunedCache(), Naive([Row(0)])
    _extend(cache, naive, [[True] * 3], [{2}, {0, 1, 2}, {0}])
    cache.crop(1)
    naive.crop(1)
    cache.batch_repeat_interleave(2)
    naive.select([0, 0])
    _check(cache, naive)


def _filled(columns: int = 4) -> PrunedCache:
    cache = PrunedCache()
    _extend(cache, Naive([Row(0)]), [[True] * columns], [set(range(columns))] * LAYERS)
    return cache


def test_crop_to_nothing_removed_and_too_much() -> None:
    cache = _filled()
    cache.crop(0)
    cache.crop(9)
    assert cache.get_seq_length() == 4
    with pytest.raises(ValueError, match="holds 4 tokens"):
        cache.crop(-5)


def test_crop_takes_a_tensor_as_older_assisted_decoding_gives_it() -> None:
    cache = _filled()
    cache.crop(torch.tensor(-1))  # type: ignore[arg-type]
    cache.commit(2, 2, None, {})
    assert (cache.columns_seen, cache.slots_seen, type(cache.get_seq_length())) == (5, 5, int)


def test_reset_forgets_the_conversation() -> None:
    cache = _filled()
    cache.tier, cache.conversation["rope_deltas"] = "28%", torch.ones(1, 1)
    cache.reset()
    assert (cache.tier, cache.conversation, cache.entries, cache.get_seq_length()) == (None, {}, {}, 0)
    assert not cache.is_initialized


@pytest.mark.usefixtures("no_streams")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StaticCache(LlamaConfig(), max_cache_len=8), "is a StaticCache"),
        (lambda: DynamicCache(offloading=True), "offloaded"),
    ],
)
def test_other_caches_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UnsupportedUsageError, match=message):
        PrunedCache.adopt(make())


def test_a_filled_cache_of_another_model_is_refused() -> None:
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), 0)
    with pytest.raises(UnsupportedUsageError, match="filled by another model"):
        PrunedCache.adopt(cache)


def test_an_empty_cache_becomes_a_pruned_one_in_place() -> None:
    cache = DynamicCache()
    assert PrunedCache.adopt(cache) is cache  # type: ignore[comparison-overlap]
    assert isinstance(cache, PrunedCache)
    assert PrunedCache.adopt(cache) is cache


def test_a_reduced_view_counts_slots() -> None:
    view = ReducedView(5)
    assert view.get_seq_length() == view.get_query_offset() == 5
    assert view.get_mask_sizes(3) == view.get_mask_sizes(torch.arange(3)) == (8, 0)


def test_entries_that_are_all_slots_need_no_tensors() -> None:
    assert Entries().append(0, 4, None, None).append(4, 1, None, None) == Entries(5)


def test_entries_after_pruning_name_their_slots() -> None:
    pruned = Entries().append(0, 2, torch.tensor([[1, 3]]), None)
    later: Entries = pruned.append(4, 1, None, None)
    assert isinstance(later.slots, Tensor)
    assert later.slots.tolist() == [[1, 3, 4]]
    padded = later.append(5, 1, torch.tensor([[0]]), torch.tensor([[False]]))
    assert padded.valid is not None
    assert padded.valid.tolist() == [[True, True, True, False]]
