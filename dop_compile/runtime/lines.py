"""Steps as straight-line Python: a function whose locals are the decoder's intermediates.

An interpreter would look up some ten arguments per layer in each token that is generated. A local is freed behind its
last use, as those of the original forward are. A function that lets go of its own arguments before it returns is handed
them over: `(v5, v5 := None)[0]` leaves no reference here.
"""

from __future__ import annotations

import itertools
import linecache
import math
import operator
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dop_compile.tokens import TokenSet

__all__ = ["STATE", "Method", "Step", "Value", "Weight", "straight_line"]


@dataclass(frozen=True)
class Value:
    """What a step returns, or an input."""

    number: int

    @property
    def name(self) -> str:
        return f"v{self.number}"


@dataclass(frozen=True)
class Weight:
    """A parameter that a graph reads: looked up in each call, so that a replaced one is followed."""

    owner: nn.Module
    name: str

    def value(self) -> Any:
        return getattr(self.owner, self.name)


@dataclass(frozen=True)
class Method:
    """A method of a step's first argument."""

    name: str


@dataclass(frozen=True)
class _Argument:
    """What the function itself is called with."""

    name: str


STATE = _Argument("state")


@dataclass(frozen=True)
class Step:
    """One call.

    Args:
        function: a `Method`, or what is called.
        args, kwargs: may hold values and weights, however deep.
        outputs: the values that it returns: a tuple of them where `unpacked`, else one.
        handed_over: whether it lets go of its arguments one by one, as the code of a graph does; none of them then
            holds another.
    """

    function: Callable[..., Any] | Method
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Value, ...]
    unpacked: bool = False
    handed_over: bool = False


def straight_line(inputs: Mapping[Value, Any], steps: Sequence[Step], result: Value, title: str) -> Any:
    """A function of a function that gives the inputs, by their keys, and of a state; it returns what `result` then is.

    Its `source` is the text, which tracebacks show too.
    """
    lines = _Lines()
    freed = _freed_behind(steps)
    lines.extend(f"{value.name} = given({lines.text(key)})" for value, key in inputs.items())
    for number, step in enumerate(steps):
        ending = [value for value in freed[number] if value != result]
        direct = [arg for arg in step.args if isinstance(arg, Value)] if step.handed_over else []
        given = [value for value in ending if direct.count(value) == 1]
        lines.append(lines.call(step, given))
        if names := [value.name for value in ending if value not in given]:
            lines.append(f"del {', '.join(names)}")
    source = "\n    ".join(["def decoder(given, state):", *lines, f"return {result.name}"]) + "\n"
    file = f"<{title} {next(_numbers)}>"
    namespace = dict(lines.constants)
    exec(compile(source, file, "exec"), namespace)
    function = namespace["decoder"]
    function.source = source
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    weakref.finalize(function, linecache.cache.pop, file, None)
    return function


_numbers = itertools.count()


def _freed_behind(steps: Sequence[Step]) -> list[list[Value]]:
    """Per step the values that no later one uses."""
    last: dict[Value, int] = {}

    def note(part: Any, number: int) -> None:
        if isinstance(part, Value):
            last[part] = number
        for inner in _parts(part):
            note(inner, number)

    for number, step in enumerate(steps):
        note((step.args, step.kwargs, step.outputs), number)
    freed: list[list[Value]] = [[] for _ in steps]
    for value, number in last.items():
        freed[number].append(value)
    return freed


def _parts(value: Any) -> Sequence[Any]:
    """What a container holds; nothing for anything else."""
    if isinstance(value, tuple | list):
        return value
    if isinstance(value, Mapping):
        return list(value.values())
    return (value.start, value.stop, value.step) if isinstance(value, slice) else ()


class _Lines(list[str]):
    """Lines, and the constants that they name."""

    def __init__(self) -> None:
        super().__init__()
        self.constants: dict[str, Any] = {}
        self._names: dict[Any, str] = {}

    def call(self, step: Step, given: Collection[Value]) -> str:
        """The line of a step, which is the last to use the values `given` to it."""
        args = [
            self._handed_over(arg) if isinstance(arg, Value) and arg in given else self.text(arg) for arg in step.args
        ]
        kwargs = [f"{name}={self.text(value)}" for name, value in step.kwargs.items()]
        if step.function is operator.getitem:
            right = f"{args[0]}[{args[1]}]"
        elif isinstance(step.function, Method):
            right = f"{args[0]}.{step.function.name}({', '.join(args[1:] + kwargs)})"
        else:
            right = f"{self._constant(step.function)}({', '.join(args + kwargs)})"
        left = ", ".join(value.name for value in step.outputs)
        return f"{left}{',' * (step.unpacked and len(step.outputs) == 1)} = {right}" if left else right

    @staticmethod
    def _handed_over(value: Value) -> str:
        """A local that is None from then on."""
        return f"({value.name}, {value.name} := None)[0]"

    def text(self, value: Any) -> str:
        if isinstance(value, Value | _Argument):
            return value.name
        if isinstance(value, Weight):
            return f"{self._constant(value.owner)}.{value.name}"
        if isinstance(value, tuple | list):
            inner = "".join(f"{self.text(part)}, " for part in value)
            return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{key!r}: {self.text(part)}' for key, part in value.items())}}}"
        if isinstance(value, slice):
            return f"slice({', '.join(map(self.text, _parts(value)))})"
        if value is None or value is Ellipsis or type(value) in (bool, int, str):
            return "..." if value is Ellipsis else repr(value)
        if type(value) is float and math.isfinite(value):
            return repr(value)
        return self._constant(value)

    def _constant(self, value: Any) -> str:
        """The name of an object, the same for the same one."""
        key = value if isinstance(value, TokenSet) else id(value)  # equal sets are one object, told by `is`
        if key not in self._names:
            name = f"c{len(self._names)}"
            self._names[key] = name
            self.constants[name] = value
        return self._names[key]
