"""Values per token among a mask builder's arguments, taken for other tokens: the decoder's slots, or other rows.

1. A tensor (rows, columns, ...) is gathered. Block ids may be shorter than the conversation; Hugging Face's builders
   then read -1 (no block), and so does this.
2. A mask function is made anew with what it closes over gathered in the same way, however deep. Numbers that it closes
   over (windows) are left: those count slots.

Refused: tensors that are no values per column (lengths, for one, count the caller's columns), callables that are no
plain functions.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dop_compile.errors import UnsupportedUsageError
from dop_compile.hf.names import BLOCKS
from dop_compile.hf.rebuilt import remade

__all__ = ["MaskValues"]


class MaskValues:
    """Gathers values per token.

    Args:
        rows, columns: (batch, slots), or (batch, 1) for `rows`: the caller's row and column of each slot.
        size: number of the caller's rows and columns, columns since the conversation began.
    """

    def __init__(self, rows: Tensor, columns: Tensor, size: tuple[int, int]):
        self._rows, self._columns, self._size = rows, columns, size
        self._made: dict[types.FunctionType, types.FunctionType] = {}

    def follow(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a mask builder, by name, for the slots.

        Raises:
            UnsupportedUsageError: one of them cannot be followed.
        """
        return {name: self._value(name, value) for name, value in arguments.items()}

    def _value(self, name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(name, value)
        if type(value) in (tuple, list):
            return type(value)(self._value(name, part) for part in value)
        if type(value) is dict:
            return {key: self._value(name, part) for key, part in value.items()}
        if isinstance(value, functools.partial):
            parts = self._value(name, value.func), self._value(name, value.args), self._value(name, value.keywords)
            return functools.partial(parts[0], *parts[1], **parts[2])
        if isinstance(value, types.FunctionType):
            return self._function(name, value)
        if isinstance(value, nn.Module | types.MethodType) or (
            callable(value) and not isinstance(value, type | types.BuiltinFunctionType)
        ):
            raise UnsupportedUsageError(
                f"the attention mask is built from {name}, which holds a {type(value).__name__}; tokens were removed, "
                "and what such an object reads cannot be followed. Pass a plain function of tensors (batch, tokens)"
            )
        return value

    def _tensor(self, name: str, value: Tensor) -> Tensor:
        batch, columns = self._size
        if value.dim() >= 2 and value.shape[0] in (1, batch):
            if name == BLOCKS and value.dim() == 2 and value.shape[1] < columns:
                value = F.pad(value, (0, columns - value.shape[1]), value=-1)
            if value.shape[1] >= columns:
                value = value.expand(batch, *value.shape[1:])
                return value[self._rows.to(value.device), self._columns.to(value.device)]
        raise UnsupportedUsageError(
            f"the attention mask is built from {name}, which holds a tensor {tuple(value.shape)}; tokens were removed, "
            f"and it must be {(batch, columns)}, a value for every token of the conversation, to be followed"
        )

    def _function(self, name: str, function: types.FunctionType) -> types.FunctionType:
        if function in self._made:
            return self._made[function]
        self._made[function] = function  # one that names itself
        held = [_contents(cell) for cell in function.__closure__ or ()]
        inside = (held, list(function.__defaults__ or ()), function.__kwdefaults__ or {})
        followed = tuple(self._value(name, part) for part in inside)
        if not _same(inside, followed):
            cells = tuple(types.CellType(value) for value in followed[0])
            made = remade(function, function.__globals__, tuple(followed[1]), cells, followed[2])
            self._made[function] = made
        return self._made[function]


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return None


def _same(first: Any, second: Any) -> bool:
    if type(first) in (tuple, list):
        return all(map(_same, first, second))
    if type(first) is dict:
        return all(map(_same, first.values(), second.values()))
    return first is second
