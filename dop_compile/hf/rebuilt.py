"""Functions of transformers made anew from their code, with other values around them.

A modeling file's functions look masks, kernels and helpers up by global names. A copy of a function that sees other
ones under these names does what the original does, for one call and one thread, and nothing of the library is patched.
"""

from __future__ import annotations

import inspect
import types
from typing import Any

__all__ = ["names_in", "names_of", "remade", "with_globals"]


def remade(
    function: types.FunctionType,
    namespace: dict[str, Any],
    defaults: tuple[Any, ...] | None,
    closure: tuple[types.CellType, ...] | None,
    keyword_defaults: dict[str, Any] | None,
) -> types.FunctionType:
    """A function's code with other globals, defaults and cells."""
    made = types.FunctionType(function.__code__, namespace, function.__name__, defaults or None, closure or None)
    made.__kwdefaults__ = keyword_defaults or None
    return made


def with_globals(function: types.FunctionType, namespace: dict[str, Any]) -> types.FunctionType:
    """The function with other globals."""
    return remade(function, namespace, function.__defaults__, function.__closure__, function.__kwdefaults__)


def names_in(function: Any) -> set[str]:
    """Global names and attributes that a function uses, and the functions written inside it."""
    return names_of(inspect.unwrap(function).__code__)


def names_of(code: types.CodeType) -> set[str]:
    """`names_in` of a function's code."""
    names: set[str] = set()
    codes = [code]
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return names
