"""Shallow copies carry nothing that is bound to their source."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dop_compile.hf.copies import copy_path, own, rebind, rebound, shallow_copy


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor

    def who(self) -> Scale:
        return self


def by_method(module: Scale) -> Callable[[], Scale]:
    return module.who


def by_partial(module: Scale) -> Callable[[], Scale]:
    return functools.partial(Scale.who, module)


def by_keyword(module: Scale) -> Callable[[], Scale]:
    return functools.partial(lambda *, module: module.who(), module=module)


def by_closure(module: Scale) -> Callable[[], Scale]:
    original = module.who
    return lambda: original()


def by_inner_function(module: Scale) -> Callable[[], Scale]:
    original = by_closure(module)

    def outer() -> Scale:
        def inner() -> Scale:
            return original()

        return inner()

    return outer


def by_default(module: Scale) -> Callable[[], Scale]:
    return lambda module=module: module


def by_method_of_a_function(module: Scale) -> Callable[[], Scale]:
    def who(self: Scale) -> Scale:
        assert self is captured or self is not module
        return captured

    captured = module
    return types.MethodType(who, module)


def by_globals(module: Scale) -> Callable[[], Scale]:
    namespace: dict[str, Any] = {"module": module, "calls": []}
    exec("def who():\n    calls.append(len(later))\n    return module", namespace)
    namespace["later"] = "assigned after the function was made"
    return namespace["who"]  # type: ignore[no-any-return]


WAYS = (
    by_method,
    by_partial,
    by_keyword,
    by_closure,
    by_inner_function,
    by_default,
    by_method_of_a_function,
    by_globals,
)


@pytest.mark.parametrize("way", WAYS)
def test_a_function_on_an_instance_leads_to_the_copy(way: Callable[[Scale], Callable[[], Scale]]) -> None:
    module = Scale()
    module.find = way(module)
    copy = shallow_copy(module, own_children=False)
    assert copy.find() is copy
    assert module.find() is module


def test_what_leads_nowhere_stays_the_same_object() -> None:
    module = Scale()
    module.function = function = lambda x: x + 1
    module.partial = partial = functools.partial(function, 3)
    copy = shallow_copy(module, own_children=False)
    assert copy.function is function
    assert copy.partial is partial
    assert copy.factor == 2.0


def test_a_function_that_refers_to_itself() -> None:
    module = Scale()

    def again(count: int) -> Scale:
        return again(count - 1) if count else module

    module.again = again
    copy = shallow_copy(module, own_children=False)
    assert copy.again(0) is copy


def test_variables_of_a_closure_stay_shared() -> None:
    module, calls = Scale(), 0

    def count() -> Scale:
        nonlocal calls
        calls += 1
        return module

    module.count = count
    shallow_copy(module, own_children=False).count()
    assert calls == 1


def test_a_compiled_call_of_the_source_is_left_out() -> None:
    module = Scale()
    module.compile(backend="eager")
    vars(module)["_compiled_call"] = module.forward  # as transformers' generate keeps it
    copy = shallow_copy(module, own_children=False)
    copy.factor = 5.0
    assert not hasattr(copy, "_compiled_call")
    assert copy(torch.ones(())).item() == 5.0


def test_a_compiled_forward_is_the_copys() -> None:
    module = Scale()
    module.forward = torch.compile(module.forward, backend="eager")
    copy = shallow_copy(module, own_children=False)
    copy.factor = 5.0
    assert copy(torch.ones(())).item() == 5.0


def test_functions_of_the_compiled_model_itself_are_left_alone() -> None:
    module = Scale()
    module.find = own(lambda: module)
    assert shallow_copy(module, own_children=False).find() is module


def test_functions_across_a_path() -> None:
    root = nn.Module()
    root.inner = Scale()
    root.find = root.inner.who
    chain = copy_path(root, "inner")
    rebind(chain[0], {id(root.inner): chain[1]})
    assert chain[0].find() is chain[1]
    assert rebound(3, {}) == 3
