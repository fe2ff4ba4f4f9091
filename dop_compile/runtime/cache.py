"""A key/value cache whose layers hold what the policy keeps, and that reports the caller's length.

Three coordinates are kept apart. A *column* is the caller's: the position in `input_ids` and `attention_mask` since
the conversation began. A *slot* is the decoder's: the sequence after token reduction, which masks and sliding windows
count in. An *entry* is what one layer stores: the slots whose group kept `mha_key_value` there, or in a later layer
that reads the same keys and values. Such a layer stores nothing; which entries it sees is told of each layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

from dop_compile.errors import UnsupportedUsageError
from dop_compile.runtime.entries import Entries

__all__ = ["PrunedCache", "ReducedView"]


class PrunedCache(DynamicCache):
    """Cache of a compiled model: unequal layer lengths inside, Hugging Face's contract outside.

    `get_seq_length()` is the caller's length, before reduction. Everything that belongs to a conversation - its tier,
    the columns that were kept, position shifts, a model's rope deltas - lives here and follows reorder, repeat,
    select and crop.
    """

    def __init__(self) -> None:
        Cache.__init__(self, layer_class_to_replicate=DynamicLayer)
        self._start()

    def _start(self) -> None:
        self.tier: str | None = None
        self.policy: Any = None
        self.columns_seen = 0
        self.slots_seen = 0
        self.columns: Tensor | None = (
            None  # (batch, slots) column of each slot, -1 for padding; None: slot i is column i
        )
        self.position_shift: Tensor | None = None  # (batch, 1) subtracted from the caller's positions
        self.entries: dict[int, Entries] = {}
        self.conversation: dict[str, Any] = {}

    @classmethod
    def adopt(cls, cache: Any) -> PrunedCache:
        """Turn the caller's own empty `DynamicCache` into a pruned one, in place, so that the caller keeps it.

        Raises:
            UnsupportedUsageError: for any other cache.
        """
        cls.check(cache)
        if isinstance(cache, PrunedCache):
            return cache
        cache.__class__ = cls
        adopted = cast(PrunedCache, cache)
        adopted.layers = []
        adopted.layer_class_to_replicate = DynamicLayer
        adopted._start()
        return adopted

    @staticmethod
    def check(cache: Any) -> None:
        """Whether a compiled model can use the caller's cache; it is left as it is.

        Raises:
            UnsupportedUsageError: neither a pruned cache nor an empty, plain `DynamicCache`.
        """
        if isinstance(cache, PrunedCache):
            return
        if type(cache) is not DynamicCache:
            raise UnsupportedUsageError(
                f"the cache is a {type(cache).__name__}; a compiled model stores layers of unequal length and "
                "works with a DynamicCache only (pass none, and leave cache_implementation unset)"
            )
        if cache.offloading:
            raise UnsupportedUsageError("an offloaded cache is not supported by a compiled model; use a plain one")
        if any(_holds_tokens(layer) for layer in cache.layers):
            raise UnsupportedUsageError(
                "the cache was filled by another model; start the conversation with the compiled model"
            )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns_seen

    def hold_states(self, config: Any) -> None:
        """Make the layers of a decoder with mixers, which keep their states here themselves, as Hugging Face's do."""
        if not self.layers:
            self.layers = [_without_window(layer) for layer in DynamicCache(config=config).layers]

    @property
    def holds_states(self) -> bool:
        """Whether any layer is one of a mixer."""
        return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers)

    # The compiled decoder asks a `ReducedView` for sizes and stores by `store`. Who asks or updates the cache itself is
    # a model that knows nothing of the conversation that it holds, nor of what was pruned from it.

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        raise self._foreign()

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise self._foreign()

    def _foreign(self) -> UnsupportedUsageError:
        return UnsupportedUsageError(
            f"the cache belongs to a conversation with tier {self.tier!r} of a compiled model and cannot be "
            "continued or begun by another model; use the compiled model, or a new cache"
        )

    def store(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append keys and values (batch, heads, entries, head dimension) to a layer; returns all that it holds."""
        return super().update(keys, values, layer)

    def preview(self, keys: Tensor, values: Tensor | None, layer: int) -> tuple[Tensor, Tensor | None]:
        """What `store` would return, and nothing is stored; without `values`, none."""
        stored = cast(DynamicLayer, self.layers[layer]) if layer < len(self.layers) else None
        if stored is None or not stored.is_initialized:
            return keys, values
        held = (cast(Tensor, stored.keys), cast(Tensor, stored.values))
        return torch.cat([held[0], keys], dim=-2), None if values is None else torch.cat([held[1], values], dim=-2)

    @property
    def is_initialized(self) -> bool:
        return self.columns_seen > 0

    def commit(self, columns: int, slots: int, new_columns: Tensor | None, new_entries: dict[int, Entries]) -> None:
        """Record what a forward call added: the caller's columns, the slots they became, the layers' entries."""
        self.columns = self.all_columns(slots, new_columns)
        self.columns_seen += columns
        self.slots_seen += slots
        self.entries = new_entries

    def all_columns(self, slots: int, new_columns: Tensor | None) -> Tensor | None:
        """(batch, slots) columns of past and new slots; None while every column is a slot."""
        if self.columns is None and new_columns is None:
            return None
        known = new_columns if new_columns is not None else self.columns
        assert known is not None
        batch, device = known.shape[0], known.device
        old = self.columns
        if old is None:
            old = torch.arange(self.slots_seen, device=device).expand(batch, -1)
        if new_columns is None:
            new = torch.arange(self.columns_seen, self.columns_seen + slots, device=device).expand(batch, -1)
        else:
            new = torch.where(new_columns < 0, -1, new_columns + self.columns_seen)
        return torch.cat([old, new], dim=1)

    # --- what generate does to a cache ----------------------------------------------------------------------------

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for stored in [layer for layer in self.layers if isinstance(layer, DynamicLayer)]:
            # Hugging Face's layers leave out those without entries, whose next ones still need the right rows
            if stored.is_initialized and stored.keys is not None and stored.keys.shape[-2] == 0:
                stored.keys, stored.values = change(stored.keys), change(cast(Tensor, stored.values))
        self.columns = None if self.columns is None else change(self.columns)
        self.position_shift = None if self.position_shift is None else change(self.position_shift)
        shared = {id(entries): entries.rows(change) for entries in self.entries.values()}
        self.entries = {layer: shared[id(entries)] for layer, entries in self.entries.items()}
        self.conversation = {
            name: change(value) if isinstance(value, Tensor) else value for name, value in self.conversation.items()
        }

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(cast(torch.LongTensor, beam_idx))
        self._rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each_layer("batch_repeat_interleave", repeats, lambda t: t.repeat_interleave(repeats, dim=0))
        self._rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each_layer("batch_select_indices", indices, lambda t: t[indices.to(t.device)])
        self._rows(lambda t: t[indices.to(t.device)])

    def _each_layer(self, method: str, argument: Any, states: Callable[[Tensor], Tensor]) -> None:
        """A method of the layers that store keys and values; the states of mixers have none."""
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                for held in (layer.conv_states, layer.recurrent_states):
                    held.update({number: states(state) for number, state in held.items() if state is not None})
            if isinstance(layer, DynamicLayer):
                getattr(layer, method)(argument)

    def reset(self) -> None:
        self.layers = []
        self._start()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the caller's last columns: a negative number removes that many, a positive one keeps that many."""
        tokens_to_remove = int(tokens_to_remove)  # assisted decoding may pass a tensor, which `+=` would share
        if tokens_to_remove == 0:
            return
        keep = tokens_to_remove if tokens_to_remove > 0 else self.columns_seen + tokens_to_remove
        if keep >= self.columns_seen:
            return
        if keep < 0:
            raise ValueError(f"crop({tokens_to_remove}): the cache holds {self.columns_seen} tokens")
        if self.holds_states:
            raise UnsupportedUsageError(
                "the cache holds states of recurrent or convolutional layers, which cannot forget their last tokens; "
                "generate without an assistant and without prompt lookup"
            )
        live = None if self.columns is None else (self.columns < keep)
        slots = keep if live is None else int(live.sum(dim=1).max()) if live.numel() else 0
        shared: dict[int, Entries] = {}
        for layer, entries in self.entries.items():
            if id(entries) not in shared:
                shared[id(entries)] = self._cropped(entries, slots, live)
            self.entries[layer] = shared[id(entries)]
        for layer, stored in enumerate(self.layers):  # a layer that reads those of another one stores none
            if isinstance(stored, DynamicLayer) and stored.keys is not None and stored.values is not None:
                count = self.entries[layer].count
                stored.keys = stored.keys[..., :count, :]
                stored.values = stored.values[..., :count, :]
        if self.columns is not None:
            cut = self.columns[:, :slots]
            self.columns = torch.where(cut < keep, cut, -1)
        self.columns_seen, self.slots_seen = keep, slots

    @staticmethod
    def _cropped(entries: Entries, slots: int, live: Tensor | None) -> Entries:
        """Slots stand in ascending order in every row, so the entries to drop are the last ones of each row."""
        if entries.slots is None and live is None:
            return Entries(min(entries.count, slots))  # of which all are seen
        if entries.slots is None:
            assert live is not None
            keeps = live[:, : entries.count]
        else:
            keeps = entries.slots < slots if live is None else live.gather(1, entries.slots)
        if entries.valid is not None:
            keeps = keeps & entries.valid
        positions = torch.arange(entries.count, device=keeps.device).expand_as(keeps)
        count = int(torch.where(keeps, positions + 1, 0).max()) if keeps.numel() else 0
        keeps = keeps[:, :count]
        kept_slots = positions[:, :count] if entries.slots is None else entries.slots[:, :count]
        seen = None if entries.seen is None else entries.seen[:, :count]
        return Entries(count, kept_slots.clamp(max=max(slots - 1, 0)), None if bool(keeps.all()) else keeps, seen)


def _holds_tokens(layer: Any) -> bool:
    if isinstance(layer, LinearAttentionCacheLayerMixin) and any(layer.has_previous_state.values()):
        return True
    return isinstance(layer, DynamicLayer) and layer.get_seq_length() > 0


def _without_window(layer: Any) -> Any:
    """A layer that stores what the policy keeps: a window is cut by the mask, since entries are not consecutive."""
    if not isinstance(layer, DynamicSlidingWindowLayer):
        return layer
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        return LinearAttentionAndFullAttentionLayer(number_of_states=layer.number_of_states)
    return DynamicLayer()  # type: ignore[no-untyped-call]


class ReducedView(Cache):
    """What mask builders see of a cache: its length in slots, the same for every layer."""

    def __init__(self, slots: int):
        super().__init__(layers=[])
        self._slots = slots

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._slots

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._slots

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        # transformers 5.17 may pass the positions instead of their number
        length = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self._slots + length, 0
