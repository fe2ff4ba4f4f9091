"""Straight-line programs: what they compute, what they free, what tracebacks show."""

from __future__ import annotations

import operator
import traceback
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from dop_compile.runtime.lines import STATE, Method, Step, Value, Weight, straight_line


def run(steps: list[Step], result: Value, state: Any = None, **inputs: Any) -> Any:
    keys = {Value(number): name for number, name in enumerate(inputs)}
    return straight_line(keys, steps, result, "test")(inputs.__getitem__, state)


def test_arguments_of_every_kind() -> None:
    x, y = Value(0), Value(1)
    nested = (x, [x, {"a": x}], slice(None, x, 2), ..., 1.5, float("inf"), "s", torch.float32)
    steps = [Step(lambda *args, **kwargs: (args, kwargs), (nested,), {"named": [x]}, (y,))]
    ((found,), named) = run(steps, y, x=3)
    assert found == (3, [3, {"a": 3}], slice(None, 3, 2), ..., 1.5, float("inf"), "s", torch.float32)
    assert named == {"named": [3]}


def test_methods_items_and_tuples() -> None:
    x, parts, one, last = Value(0), Value(1), Value(2), Value(3)
    steps = [
        Step(Method("split"), (x, "-"), {"maxsplit": 1}, (parts,)),
        Step(operator.getitem, (parts, 1), {}, (one,)),
        Step(lambda text: (text * 2,), (one,), {}, (last,), unpacked=True),
    ]
    assert run(steps, last, x="a-b-c") == "b-cb-c"


def test_the_state_is_handed_on() -> None:
    y = Value(1)
    assert run([Step(lambda state: state, (STATE,), {}, (y,))], y, state="now", x=0) == "now"


def test_replaced_weights_are_followed() -> None:
    layer, y = nn.Linear(2, 2), Value(0)
    function = straight_line({}, [Step(lambda weight: weight, (Weight(layer, "weight"),), {}, (y,))], y, "test")
    assert function(None, None) is layer.weight
    layer.weight = nn.Parameter(torch.zeros(2, 2))
    assert function(None, None) is layer.weight


def test_values_are_freed_behind_their_last_use() -> None:
    alive: list[bool] = []
    made: list[weakref.ref[Any]] = []

    def make(_: Any) -> torch.Tensor:
        tensor = torch.zeros(1)
        made.append(weakref.ref(tensor))
        return tensor

    x, y, z, last = (Value(number) for number in range(4))
    steps = [
        Step(make, (x,), {}, (y,)),
        Step(lambda tensor: tensor + 1, (y,), {}, (z,)),
        Step(lambda tensor: alive.append(made[0]() is not None) or tensor, (z,), {}, (last,)),
    ]
    run(steps, last, x=0)
    assert alive == [False]


def test_tracebacks_show_the_line() -> None:
    def fail(_: Any) -> Any:
        raise RuntimeError("here")

    y = Value(1)
    with pytest.raises(RuntimeError) as caught:
        run([Step(fail, (Value(0),), {}, (y,))], y, x=0)
    assert "v1 = c0(v0)" in "".join(traceback.format_exception(caught.value))


class Held:
    """Something whose end can be seen."""


@pytest.mark.parametrize("handed_over", [True, False])
def test_arguments_are_handed_over_at_their_last_use(handed_over: bool) -> None:
    x, y, other, result = (Value(number) for number in range(4))
    ends: list[bool] = []

    def uses(value: Any, *_: Any) -> Any:
        seen = weakref.ref(value)
        value = None
        ends.append(seen() is None)
        return result

    def step(*args: Any) -> Step:
        return Step(uses, args, {}, (result,), handed_over=handed_over)

    made = [Step(Held, (), {}, (value,)) for value in (x, y)]
    steps = [*made, step(x, [1], other), step(x), step(y, y)]
    assert run([Step(Held, (), {}, (other,)), *steps], result) is result
    # Not while it is used again, and not where it is two arguments
    assert ends == [False, handed_over, False]
