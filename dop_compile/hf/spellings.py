"""How functions of Hugging Face models spell their arguments: the caller's into this package's, and into their own.

Transformers renames arguments between releases (`past_key_values` became `cache` in 5.24), and a model with code of its
own may be behind. Nothing here asks for a version: a function's signature says which spelling it goes by. Inside the
package an argument has one name, a key of `SPELLINGS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from dop_compile.errors import UnsupportedModelError

__all__ = [
    "CACHE",
    "EMBEDS",
    "IDS",
    "MASK",
    "POSITIONS",
    "cache_of",
    "canonical",
    "parameters",
    "require",
    "signature",
    "spelled",
]

IDS, EMBEDS, MASK, POSITIONS, CACHE = "input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values"

SPELLINGS: dict[str, tuple[str, ...]] = {
    IDS: (IDS,),
    EMBEDS: (EMBEDS, "input_embeds"),
    MASK: (MASK,),
    POSITIONS: (POSITIONS,),
    CACHE: (CACHE, "cache", "past_key_value", "layer_past", "cache_params"),
}
"""What each argument is called, by this package's name for it."""


@dataclass(frozen=True)
class _Names:
    """A function's parameters, its own spelling of the arguments that it names, and what each spelling means to it."""

    signature: inspect.Signature
    parameters: Mapping[str, inspect.Parameter]
    own: Mapping[str, str]
    meant: Mapping[str, str]
    takes_any: bool


_KNOWN: WeakKeyDictionary[Callable[..., Any], _Names] = WeakKeyDictionary()
"""Kept, since signatures are slow to make and asked for with every token."""


def _names(function: Callable[..., Any]) -> _Names:
    function = getattr(function, "__func__", function)  # a bound method is gone at once, and holds its model
    if (known := _KNOWN.get(function)) is None:
        signature = inspect.signature(function)
        parameters = signature.parameters
        own = {name: s for name, spellings in SPELLINGS.items() for s in reversed(spellings) if s in parameters}
        meant = {  # a further parameter of the function's own means something else
            s: name
            for name, spellings in SPELLINGS.items()
            for s in spellings
            if s not in parameters or s == own.get(name)
        }
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        known = _KNOWN[function] = _Names(signature, parameters, own, meant, takes_any)
    return known


def parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """A function's parameters by name; a method's with `self`."""
    return _names(function).parameters


def signature(function: Callable[..., Any]) -> inspect.Signature:
    """A function's signature; a method's with `self`."""
    return _names(function).signature


def canonical(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call of `function`, under this package's names.

    Raises:
        ValueError: two spellings of one argument with different values.
    """
    return _renamed(arguments, _names(function).meant, {})


def spelled(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments as `function` spells them, whichever way they are spelled; others are left as they are.

    Raises:
        ValueError: as `canonical`.
    """
    names = _names(function)
    return _renamed(arguments, names.meant, names.own)


def require(function: Callable[..., Any], *arguments: str) -> None:
    """Check that a function takes arguments, by this package's names, under some spelling that is known.

    Raises:
        UnsupportedModelError: it does not; the message names the parameters that it has.
    """
    names = _names(function)
    for name in arguments:
        if name not in names.own and not names.takes_any:
            raise UnsupportedModelError(
                f"{getattr(function, '__qualname__', function)} takes {', '.join(names.parameters)}; expected "
                f"{' or '.join(SPELLINGS[name])} among them"
            )


def _renamed(arguments: Mapping[str, Any], meant: Mapping[str, str], own: Mapping[str, str]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for spelling, value in arguments.items():
        name = meant.get(spelling, spelling)
        name = own.get(name, name)
        other = result.get(name)
        if other is not None and value is not None and other is not value:
            both = " and ".join(s for s in arguments if own.get(meant.get(s, s), meant.get(s, s)) == name)
            raise ValueError(f"{both} are two names of one argument, given with different values; pass one of them")
        result[name] = other if value is None else value
    return result


def cache_of(output: Any) -> Any:
    """The cache in what a model, a decoder or `generate` returned; None if there is none."""
    fields = getattr(output, "__dict__", {})
    return next((fields[s] for s in SPELLINGS[CACHE] if fields.get(s) is not None), None)
