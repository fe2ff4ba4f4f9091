"""Shallow copies of modules: the same parameters, children and hooks, and nothing that is bound to the source.

What stands in a module's `__dict__` may lead back to the module it was made for. In a copy

1. a compiled call (`module.compile()`, generate's own) is left out, which would run the source;
2. a method of the source set on the instance, a `functools.partial` of it and a function whose closure, defaults or
   globals hold the source, get the copy in its place (of functions in globals, those of the same module are looked
   into);
3. a function made by `torch.compile` is taken as the function it was made of.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from dop_compile.hf.rebuilt import names_of, remade

__all__ = ["BOUND_CALLS", "copy_path", "is_own", "own", "own_forward", "rebind", "rebound", "shallow_copy"]

F = TypeVar("F", bound=Callable[..., Any])

BOUND_CALLS = ("_compiled_call_impl", "_compiled_call", "_last_compile_config")
"""Attributes that hold a compiled call of the very module they stand in."""


def shallow_copy(module: nn.Module, *, own_children: bool) -> Any:
    """A module of the same class that shares everything with another, but for what is bound to it."""
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    for name in BOUND_CALLS:
        copy.__dict__.pop(name, None)
    if own_children:
        copy.__dict__["_modules"] = dict(module._modules)
    rebind(copy, {id(module): copy})
    return copy


def copy_path(root: nn.Module, path: str) -> list[Any]:
    """Shallow copies of the modules from `root` down to `path`, linked to each other."""
    chain = [shallow_copy(root, own_children=True)]
    for name in path.split("."):
        child = shallow_copy(chain[-1]._modules[name], own_children=True)
        chain[-1]._modules[name] = child
        chain.append(child)
    return chain


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of a module's class, bound to it, or the one that was put on the instance."""
    forward: Callable[..., Any] = vars(module).get("forward") or functools.partial(type(module).forward, module)
    return forward


_FOLLOWED = (types.FunctionType, types.MethodType, functools.partial)
_own: weakref.WeakSet[Any] = weakref.WeakSet()


def own(function: F) -> F:
    """Mark a function that dop_compile puts on instances: it is for the very instance and is not rebound."""
    _own.add(function)
    return function


def is_own(function: Any) -> bool:
    return isinstance(function, types.FunctionType) and function in _own


def rebind(module: nn.Module, modules: Mapping[int, nn.Module]) -> None:
    """Let the functions set on an instance lead to other modules: `modules` by the `id` of those they replace."""
    attributes = vars(module)
    for name in [name for name, value in attributes.items() if isinstance(value, _FOLLOWED)]:
        attributes[name] = rebound(attributes[name], modules)


def rebound(value: Any, modules: Mapping[int, nn.Module]) -> Any:
    """A function that leads to other modules; `value` itself where it leads to none of those replaced."""
    return _rebound(value, modules, {})


def _rebound(value: Any, modules: Mapping[int, nn.Module], known: dict[int, Any]) -> Any:
    if isinstance(value, nn.Module):
        return modules.get(id(value), value)
    if not isinstance(value, _FOLLOWED) or is_own(value):
        return value
    if id(value) not in known:
        known[id(value)] = value  # a function that refers to itself keeps doing so
        follow = functools.partial(_rebound, modules=modules, known=known)
        if isinstance(value, types.MethodType):
            owner, function = follow(value.__self__), follow(value.__func__)
            changed = owner is not value.__self__ or function is not value.__func__
            known[id(value)] = types.MethodType(function, owner) if changed else value
        elif isinstance(value, functools.partial):
            known[id(value)] = _partial(value, follow)
        else:
            known[id(value)] = _function(value, follow)
    return known[id(value)]


def _partial(value: functools.partial[Any], follow: Callable[[Any], Any]) -> functools.partial[Any]:
    function, args = follow(value.func), tuple(map(follow, value.args))
    keywords = {name: follow(item) for name, item in value.keywords.items()}
    before = (value.func, *value.args, *value.keywords.values())
    if all(new is old for new, old in zip((function, *args, *keywords.values()), before, strict=True)):
        return value
    return functools.partial(function, *args, **keywords)


def _function(value: types.FunctionType, follow: Callable[[Any], Any]) -> Any:
    compiled_of = getattr(value, "_torchdynamo_orig_callable", None)
    if compiled_of is not None:
        new = follow(compiled_of)
        return value if new is compiled_of else new
    cells = tuple(map(functools.partial(_cell, follow=follow), value.__closure__ or ()))
    defaults = tuple(map(follow, value.__defaults__ or ()))
    keywords = {name: follow(item) for name, item in (value.__kwdefaults__ or {}).items()}
    used = {name: value.__globals__[name] for name in names_of(value.__code__) & value.__globals__.keys()}
    namespace = {name: new for name, old in used.items() if _near(old, value) and (new := follow(old)) is not old}
    before = (*(value.__closure__ or ()), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    same = all(new is old for new, old in zip((*cells, *defaults, *keywords.values()), before, strict=True))
    if same and not namespace:
        return value
    around = _Globals(value.__globals__, namespace) if namespace else value.__globals__
    copy = remade(value, around, defaults, cells, keywords)
    vars(copy).update(vars(value))
    return copy


def _cell(cell: types.CellType, follow: Callable[[Any], Any]) -> types.CellType:
    """The cell itself, which functions may share and write to, unless what it holds is replaced."""
    try:
        held = cell.cell_contents
    except ValueError:  # not assigned yet
        return cell
    new = follow(held)
    return cell if new is held else types.CellType(new)


def _near(value: Any, function: types.FunctionType) -> bool:
    """Whether a function's global may lead to what its author had at hand: no functions of other modules do."""
    return not isinstance(value, types.FunctionType) or value.__globals__ is function.__globals__


class _Globals(dict[str, Any]):
    """A function's globals, some of them replaced; all others are looked up as they are at the time."""

    def __init__(self, original: dict[str, Any], replaced: dict[str, Any]):
        super().__init__(replaced)
        self["__builtins__"] = original.get("__builtins__", __builtins__)
        self._original = original

    def __missing__(self, name: str) -> Any:
        return self._original[name]
