"""Reducers by name, as policies name them.

Some are built in. Others come from `register`, or from an installed package's entry point:

    [project.entry-points."dop_compile.reducers"]
    mine = "my_package.module:MyReducer"

The entry point, like a registered factory, is called with the policy's options as keyword arguments.
"""

import functools
import inspect
from collections.abc import Callable, Hashable, Mapping
from difflib import get_close_matches
from importlib.metadata import entry_points

from dop_compile.reducers.base import Reducer
from dop_compile.reducers.cdpruner import CDPrunerReducer
from dop_compile.reducers.divprune import DivPruneReducer
from dop_compile.reducers.given import GivenReducer
from dop_compile.reducers.prumerge import PruMergePlusReducer, PruMergeReducer
from dop_compile.reducers.random import RandomReducer
from dop_compile.reducers.resize import ResizeReducer
from dop_compile.reducers.select import needs
from dop_compile.reducers.trim import TrimReducer
from dop_compile.reducers.uniform import UniformReducer
from dop_compile.reducers.visionzip import VisionZipReducer
from dop_compile.reducers.vispruner import VisPrunerReducer

__all__ = ["ENTRY_POINT_GROUP", "create", "fitting", "known", "register"]

ENTRY_POINT_GROUP = "dop_compile.reducers"

_factories: dict[str, Callable[..., Reducer]] = {
    "uniform": UniformReducer,
    "random": RandomReducer,
    "given": GivenReducer,
    "vispruner": VisPrunerReducer,
    "cdpruner": CDPrunerReducer,
    "divprune": DivPruneReducer,
    "visionzip": VisionZipReducer,
    "prumerge": PruMergeReducer,
    "prumerge_plus": PruMergePlusReducer,
    "trim": TrimReducer,
    "resize": ResizeReducer,
}


def register(name: str, factory: Callable[..., Reducer]) -> None:
    """Make `factory` known as `name`. It is called with a policy's reducer options as keywords.

    Raises:
        ValueError: the name is empty, or taken by another factory.
        TypeError: the factory cannot be called.
    """
    if not name:
        raise ValueError("a reducer needs a name")
    if not callable(factory):
        raise TypeError(f"the factory of reducer {name!r} cannot be called: {factory!r}")
    if _factories.setdefault(name, factory) is not factory:
        raise ValueError(f"reducer {name!r} is registered already, by {_factories[name]!r}")


def known() -> tuple[str, ...]:
    """All names that `create` takes, sorted."""
    return tuple(sorted({*_factories, *entry_points(group=ENTRY_POINT_GROUP).names}))


def create(name: str, options: Mapping[str, object] | None = None) -> Reducer:
    """Make the reducer `name`.

    Args:
        name: a built-in or registered name, or an entry point's.
        options: keyword arguments of its factory.

    Raises:
        ValueError: an unknown name, or an option that its factory does not take or lacks.
        TypeError: what the factory made is no reducer, or an option has the wrong type.
        ImportError: the entry point of that name cannot be loaded.
    """
    factory = _find(name)
    options = dict(options or {})
    _check_options(name, factory, options)
    reducer = factory(**options)
    if not isinstance(reducer, Reducer):
        raise TypeError(
            f"reducer {name!r}: {factory!r} made a {type(reducer).__name__}, which lacks `name`, `requires` "
            "or `__call__(context, count)`"
        )
    return reducer


def fitting(supplied: frozenset[str]) -> tuple[str, ...]:
    """Names of registered reducers that can be made without options and require nothing but `supplied`, sorted.

    Without `resize`, which needs other inputs.
    """
    found = []
    for name, factory in _factories.items():
        try:
            required = needs(factory())
        except (TypeError, ValueError):
            continue
        if required <= supplied and factory is not ResizeReducer:
            found.append(name)
    return tuple(sorted(found))


def _find(name: str) -> Callable[..., Reducer]:
    if name in _factories:
        return _factories[name]
    for entry_point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        try:
            loaded: Callable[..., Reducer] = entry_point.load()
        except (ImportError, AttributeError) as error:
            raise ImportError(
                f"reducer {name!r}: its entry point {entry_point.value!r} cannot be loaded: {error}"
            ) from error
        return loaded
    close = get_close_matches(name, known(), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"unknown reducer {name!r}; {hint}Known are {', '.join(known())}")


@functools.lru_cache(maxsize=64)
def _signature(factory: Callable[..., Reducer]) -> inspect.Signature:
    return inspect.signature(factory)


def _check_options(name: str, factory: Callable[..., Reducer], options: Mapping[str, object]) -> None:
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    try:
        known = _signature(factory) if isinstance(factory, Hashable) else inspect.signature(factory)
        parameters = known.parameters.values()
    except ValueError:  # Some compiled callables have no signature; they judge their options themselves.
        return
    accepted = {p.name: p for p in parameters if p.kind in by_keyword}
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    for option in options:
        if option not in accepted and not takes_any:
            raise ValueError(
                f"unknown option {option!r} of reducer {name!r}; accepted: {', '.join(accepted) or 'none'}"
            )
    for option, parameter in accepted.items():
        if parameter.default is inspect.Parameter.empty and option not in options:
            raise ValueError(f"reducer {name!r} needs the option {option!r}")
