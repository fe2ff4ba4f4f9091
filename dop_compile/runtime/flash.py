"""FlashAttention: a kernel that aligns causality at the bottom right is called for contiguous runs of queries.

FlashAttention takes no mask. Its causal flag means that the last query sees the last key, the one before it all but
the last, and so on; a window counts keys. Both hold where the queries are the last slots and every slot is stored.
Elsewhere the queries of each row are cut into *runs*, in which every step to the next query

1. makes one more key visible (causal), 2. makes one more visible at the end and one fewer at the beginning (causal with
a window), or 3. changes nothing (not causal; queries that are no keys).

Every run, with a copy of the keys that it sees, is a sequence of its own in one variable-length call per kind of run.
Padding and queries that see no key take part in none. Hugging Face's own interface makes the call, so FlashAttention 2,
3 and 4 and kernels from its hub are the same here.

Refused: kernels that align at the top left, attention that is not causal, parts of packed rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dop_compile.errors import UnsupportedUsageError
from dop_compile.hf.kernels import KernelMask
from dop_compile.runtime.entries import Entries

__all__ = ["FlashTokens"]


@dataclass(frozen=True)
class _Runs:
    """Runs of one kind: flat positions of their queries and keys in the batch, and where each run begins."""

    causal: bool
    window: int | None
    queries: Tensor
    keys: Tensor
    query_starts: Tensor
    key_starts: Tensor
    longest: tuple[int, int]


class FlashTokens(KernelMask):
    """Stands in for a mask: which slots a layer's queries and keys are; layers with the same ones share it.

    Args:
        rows, rows_valid: (batch, queries) slot of each query since the conversation began, and whether it is a token.
        entries: what the layer stores.
        padding: (batch, slots) bool, False for padding; None where there is none.
        at_end: whether the last query of every row is its last slot.
    """

    def __init__(
        self, rows: Tensor, rows_valid: Tensor | None, entries: Entries, padding: Tensor | None, at_end: bool = False
    ):
        self._rows, self._rows_valid, self._entries = rows, rows_valid, entries
        self._padding = None if padding is None else padding.bool()
        self._at_end = at_end
        self._runs: dict[int | None, list[_Runs]] = {}
        self._is_checked = False

    @property
    def padding(self) -> Tensor | None:
        """(batch, slots) bool, False for padding; None where there is none."""
        return self._padding

    def attend(
        self, kernel: Callable[..., Any], module: Any, tensors: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, None]:
        """The kernel's output (batch, queries, heads, head dimension), zero for queries that see no key."""
        kwargs = dict(kwargs)
        causal, positions = kwargs.pop("is_causal", None), kwargs.pop("position_ids", None)
        self._check(module.is_causal if causal is None else causal, positions)
        window = kwargs.pop("sliding_window", None)
        if self._is_plain_step(window):
            return kernel(module, *tensors, None, **kwargs, sliding_window=window)  # type: ignore[no-any-return]
        batch, _, queries, _ = tensors[0].shape
        query, key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in tensors)
        out = query.new_zeros(batch * queries, query.shape[1], value.shape[-1])
        if window not in self._runs:
            self._runs[window] = self._cut(window)
        for runs in self._runs[window]:
            packed = (
                tensor.index_select(0, index).transpose(0, 1)[None]
                for tensor, index in ((query, runs.queries), (key, runs.keys), (value, runs.keys))
            )
            result = kernel(
                module,
                *packed,
                None,
                **kwargs,
                is_causal=runs.causal,
                sliding_window=runs.window,
                cu_seq_lens_q=runs.query_starts,
                cu_seq_lens_k=runs.key_starts,
                max_length_q=runs.longest[0],
                max_length_k=runs.longest[1],
            )[0]
            out = out.index_copy(0, runs.queries, result[0].to(out.dtype))
        return out.view(batch, queries, *out.shape[1:]), None

    def _check(self, causal: bool, positions: Tensor | None) -> None:
        if not causal:
            raise UnsupportedUsageError(
                "attention that is not causal cannot be pruned under FlashAttention; load the model with "
                "attn_implementation='sdpa'"
            )
        if self._is_checked or self._padding is not None or positions is None or positions.shape[0] != 1:
            return
        if positions.shape[-1] == 1:  # looking at its value would wait for the device
            return
        if bool((positions.diff(dim=-1) < 0).any()):
            raise UnsupportedUsageError(
                "position_ids tell of several sequences in one row, which FlashAttention cannot keep apart here: "
                "leave attention_mask and logits_to_keep unset, load the model with attn_implementation='sdpa', or "
                "pass the sequences as rows"
            )
        self._is_checked = True

    def _is_plain_step(self, window: int | None) -> bool:
        """Whether the one query is the last token, which sees all that is stored: nothing has to be copied for it."""
        entries = self._entries
        is_whole = entries.visible is None and self._padding is None
        return self._at_end and self._rows.shape[1] == 1 and is_whole and (window is None or entries.slots is None)

    # --- runs -----------------------------------------------------------------------------------------------------

    def _keys(self) -> tuple[Tensor, Tensor]:
        """(batch, entries) slot of each entry, and whether it is a token; on the CPU."""
        batch, entries = self._rows.shape[0], self._entries
        slots = torch.arange(entries.count, device="cpu").expand(batch, -1)
        if entries.slots is not None:
            slots = entries.slots.cpu()
        valid = torch.ones_like(slots, dtype=torch.bool) if entries.visible is None else entries.visible.cpu()
        return slots, valid if self._padding is None else valid & self._padding.cpu().gather(1, slots)

    def _cut(self, window: int | None) -> list[_Runs]:
        rows, (slots, valid) = self._rows.cpu(), self._keys()
        width, stored = rows.shape[1], slots.shape[1]
        found: dict[tuple[bool, int | None], list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]] = {}
        rows_valid = torch.ones_like(rows, dtype=torch.bool) if self._rows_valid is None else self._rows_valid.cpu()
        if self._padding is not None:
            rows_valid = rows_valid & self._padding.cpu().gather(1, rows)
        for row in range(rows.shape[0]):
            queries, keys = rows_valid[row].nonzero()[:, 0].numpy(), valid[row].nonzero()[:, 0].numpy()
            at, stored_at = rows[row].numpy()[queries], slots[row].numpy()[keys]
            end = np.searchsorted(stored_at, at, side="right")
            begin = np.searchsorted(stored_at, at - window, side="right") if window else np.zeros_like(end)
            seeing = end > begin
            queries, begin, end = queries[seeing], begin[seeing], end[seeing]
            for first, last, step in _stretches(begin, end):
                seen = np.arange(begin[first], end[last])
                kind = (step != _FLAT, int(end[first] - begin[first]) if step == _SLIDING else None)
                found.setdefault(kind, []).append((row * width + queries[first : last + 1], row * stored + keys[seen]))
        return [_pack(*kind, runs, self._rows.device) for kind, runs in found.items()]


_FLAT, _CAUSAL, _SLIDING, _BREAK = range(4)
_STEPS = {(0, 0): _FLAT, (1, 0): _CAUSAL, (1, 1): _SLIDING}


def _stretches(begin: Any, end: Any) -> list[tuple[int, int, int]]:
    """First and last query of each run and its kind of step; query i sees keys `begin[i]` to `end[i]`, less one."""
    ends, begins = np.diff(end), np.diff(begin)
    steps = np.full(len(ends), _BREAK)
    for (one, other), kind in _STEPS.items():
        steps[(ends == one) & (begins == other)] = kind
    changes = [*(np.flatnonzero(np.diff(steps)) + 1).tolist(), len(steps)]
    runs: list[tuple[int, int, int]] = []
    first, change = 0, 0
    while first < len(end):
        while change < len(changes) and changes[change] <= first:
            change += 1
        step = int(steps[first]) if first < len(steps) else _BREAK
        last = first if step == _BREAK else changes[change]
        runs.append((first, last, step))
        first = last + 1
    return runs


def _pack(causal: bool, window: int | None, runs: list[tuple[Any, Any]], device: torch.device) -> _Runs:
    index, starts, longest = [], [], []
    for side in range(2):
        lengths = [len(run[side]) for run in runs]
        index.append(torch.from_numpy(np.concatenate([run[side] for run in runs])).to(device))
        starts.append(torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device))
        longest.append(max(lengths))
    return _Runs(causal, window, index[0], index[1], starts[0], starts[1], (longest[0], longest[1]))
