"""A recorder of operations for the processor: what CUDA graphs do, and refuse, by a mode of the dispatcher.

Replayed are the same operations on the same tensors, whatever Python would do by then. Reads of values are errors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["StandInRecorder"]

aten = torch.ops.aten
_WAITS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default}
_Taped = tuple[Any, Any, Any, Any]


class StandInRecorder:
    def check(self, device: torch.device) -> None:
        pass

    def record(self, run: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
        tape: list[_Taped] = []
        with _Taping(tape):
            result = run()
        for _, args, kwargs, returned in tape:  # as a graph's, the values come with the first replay
            given = {_storage(value) for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
            for value in pytree.tree_leaves(returned):
                if isinstance(value, Tensor) and value.is_floating_point() and _storage(value) not in given:
                    value.fill_(torch.nan)

        def replay() -> None:
            for function, args, kwargs, returned in tape:
                _copy(function(*args, **kwargs), returned)

        return result, replay


def _storage(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _copy(found: Any, returned: Any) -> None:
    for new, old in zip(pytree.tree_leaves(found), pytree.tree_leaves(returned), strict=True):
        if isinstance(old, Tensor) and new.data_ptr() != old.data_ptr():
            old.copy_(new)


class _Taping(TorchDispatchMode):
    def __init__(self, tape: list[_Taped]):
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        result = function(*args, **(kwargs or {}))
        self._tape.append((function, args, kwargs or {}, result))
        return result
