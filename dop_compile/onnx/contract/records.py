"""Frozen dataclasses as strict JSON: unknown and missing fields and wrong types are errors that name them.

Field types that can be read: str, bool, int, float, dataclasses, `X | None`, unions of plain types, `tuple[X, ...]`,
`dict[str, X]` and `Policy` (as its own document).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from typing import Any, TypeVar

from dop_compile.policy.policy import Policy

__all__ = ["decode", "encode"]

T = TypeVar("T")
_PLAIN: dict[type, str] = {str: "a string", bool: "true or false", int: "an integer", float: "a number"}


def encode(value: Any) -> Any:
    """A value of these types as what `json.dumps` takes."""
    if isinstance(value, Policy):
        return json.loads(value.to_json())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: encode(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    return value


def decode(kind: type[T], document: object) -> T:
    """The dataclass that parsed JSON is a document of.

    Raises:
        ValueError: not such a document; the message names the field.
    """
    try:
        return typing.cast(T, _read(kind, document, ""))
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _read(kind: Any, value: Any, where: str) -> Any:
    if kind is Policy:
        return Policy.from_json(json.dumps(_expect(dict, value, where, "an object")))
    if dataclasses.is_dataclass(kind):
        return _read_record(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _read_union(arguments, value, where)
    if origin is tuple:
        items = _expect(list, value, where, "a list")
        return tuple(_read(arguments[0], item, f"{where}[{number}]") for number, item in enumerate(items))
    if origin is dict:
        items = _expect(dict, value, where, "an object")
        return {name: _read(arguments[1], item, f"{where}.{name}" if where else name) for name, item in items.items()}
    return _read_plain(kind, value, where)


def _read_record(kind: Any, value: Any, where: str) -> Any:
    document = _expect(dict, value, where or "document", "an object")
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    prefix = f"{where}." if where else ""
    for name in names:
        if name not in document:
            raise ValueError(f"{prefix}{name}: the field is missing")
    for name in document:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            raise ValueError(f"{prefix}{name}: unknown field" + (f"; did you mean {close[0]!r}?" if close else ""))
    return kind(**{name: _read(hints[name], document[name], f"{prefix}{name}") for name in names})


def _read_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    rest = [kind for kind in kinds if kind is not type(None)]
    if len(rest) == 1:
        return _read(rest[0], value, where)
    for kind in rest:  # a union of plain types
        if type(value) is kind:
            return value
    raise ValueError(f"{where}: expected {' or '.join(_PLAIN[kind] for kind in rest)}, got {value!r}")


def _read_plain(kind: Any, value: Any, where: str) -> Any:
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{where}: expected {_PLAIN[kind]}, got {value!r}")
    return value


def _expect(kind: type, value: Any, where: str, name: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{where}: expected {name}, got {type(value).__name__}")
    return value
