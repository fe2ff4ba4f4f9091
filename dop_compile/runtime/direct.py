"""Calls of compiled pieces past torch.compile's guards, which take longer than the kernels of a small model do.

A piece is called once through torch.compile, guards and all, by each place of a program that calls it; what its
backend was then given is noted, and tells how to make the same from the piece's own arguments. From then on that
place calls what the backend made. It checks what can differ from call to call, in a line of Python:

1. the state of torch: gradients, inference mode, autocast, modes on the stack;
2. classes, dtypes and sizes of the arguments, and what the backend assumed of sizes (its guards on them);
3. numbers on modules that the backend takes as inputs (the epsilon of a norm).

Weights are looked up in their modules each time. Strides the compiled code checks itself. Whatever does not hold goes
through torch.compile again, which compiles anew if it has to. Not taken past the guards, and refused here without a
word since it is slower and no less right: pieces with gradients or in parts, tensors of other classes, sizes or
results that cannot be told from the arguments.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import TracingContext
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP
from transformers import PreTrainedConfig

from dop_compile.runtime.lines import Value, Weight

__all__ = [
    "HOOKS",
    "TORCH_ATTRIBUTES",
    "Site",
    "canonical",
    "is_plain",
    "is_settings",
    "noting_inductor",
    "torch_state",
]

TORCH_ATTRIBUTES = frozenset(vars(nn.Module()))
"""What torch itself keeps on a module."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FUNCTIONS = (type, types.FunctionType, types.BuiltinFunctionType, functools.partial)
_PLAIN = (bool, int, float, str, tuple, torch.dtype, torch.device, PreTrainedConfig, *_FUNCTIONS)
_KNOWN_CODE = ("torch", "transformers")
_KEPT = 8
"""Direct calls that one place of a program keeps: for one row or more, one token or more."""


@dataclass(frozen=True)
class _Compiled:
    """What a backend made of a graph.

    Args:
        function: takes the graph's inputs.
        inputs: example values of these: fake tensors and symbolic sizes.
        sources: where dynamo took them from.
        environment: the symbols.
    """

    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    sources: tuple[str, ...]
    environment: Any


_Note = tuple[_Compiled, tuple[Any, ...], Any]
_notes: ContextVar[list[_Note] | None] = ContextVar("notes", default=None)


def noting_inductor(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Inductor as a backend of torch.compile whose functions can be noted."""
    placeholders = module.graph.find_nodes(op="placeholder")
    inputs = tuple(node.meta.get("example_value") for node in placeholders)
    arguments = [node.meta.get("grapharg") for node in placeholders]
    sources = tuple("" if argument is None else _source(argument.source) for argument in arguments)
    fake_mode = TracingContext.get().fake_mode
    environment = None if fake_mode is None else fake_mode.shape_env
    from torch._inductor.compile_fx import compile_fx  # a second's import, which eager models do without

    function: Any = compile_fx(module, list(example_inputs))
    compiled = _Compiled(function, inputs, sources, environment)

    def run(*args: Any) -> Any:
        result = function(*args)
        notes = _notes.get()
        if notes is not None:
            notes.append((compiled, args, result))
        return result

    return run


def _source(source: Any) -> str:
    name = source.name
    return str(name() if callable(name) else name)


@contextmanager
def _noting() -> Iterator[list[_Note]]:
    notes: list[_Note] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def torch_state() -> tuple[Any, ...] | None:
    """What of torch's own state compiled code depends on; None where calls are to go through torch.compile."""
    if torch.is_grad_enabled() or torch._C._is_any_autocast_enabled():
        return None
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return None
    return (
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
    )


def canonical(value: Any) -> Any:
    """The same tensor without what torch.compile guards on and nobody means: none of these changes a number.

    1. Strides of sizes of one, on which kernels leave odd ones.
    2. The tensor that this one is a view of, which one kernel's result has and another's has not. It stays where
       gradients flow.
    """
    if not isinstance(value, Tensor) or not value.is_contiguous():
        return value
    strides: list[int] = []
    step = 1
    for size in reversed(value.shape):
        strides.append(step)
        step *= max(size, 1)
    wanted = tuple(reversed(strides))
    if value.stride() != wanted:
        value = value.as_strided(value.shape, wanted)
    return value.data if type(value) is Tensor and value._is_view() and not value.requires_grad else value


class Site:
    """One place of a program that calls a piece.

    Args:
        piece: takes all arguments, through torch.compile.
        arguments: values that the call is given, and modules and weights that it has.
    """

    def __init__(self, piece: Callable[..., Any], arguments: Sequence[Any]):
        self._piece = piece
        self._arguments = tuple(arguments)
        self.values = tuple(argument for argument in arguments if isinstance(argument, Value))
        self._direct: tuple[Callable[..., Any], ...] = ()

    def __call__(self, state: Any, *values: Any) -> Any:
        if state is not None:
            for direct in self._direct:
                result = direct(state, values)
                if result is not None:
                    return result
        values = tuple(map(canonical, values))
        with _noting() as notes:
            result = self._piece(*self._all(values))
        if state is not None and len(notes) == 1:
            direct_call = _direct_call(*notes[0], state, self._arguments, values, result)
            if direct_call is not None:
                self._direct = (direct_call, *self._direct[: _KEPT - 1])
        return result

    def _all(self, values: Sequence[Any]) -> list[Any]:
        given = iter(values)
        return [
            next(given)
            if isinstance(argument, Value)
            else argument.value()
            if isinstance(argument, Weight)
            else argument
            for argument in self._arguments
        ]


def is_settings(value: Any) -> bool:
    """Whether a list or a table holds numbers and names alone."""
    if isinstance(value, list | dict):
        return all(map(_is_setting, value.values() if isinstance(value, dict) else value))
    return False


def _is_setting(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str) or is_settings(value)


def is_plain(module: nn.Module, *, settings: bool = False) -> bool:
    """Whether torch.compile's guards would see no more of a module than is seen without them.

    1. Its forward is torch's or transformers' own: a user's may read what it likes.
    2. It has no hooks, and no functions that close over something.
    3. Of what it holds nothing can change inside: lists and tables can, as those do by which adapters are switched.
    """
    attributes = vars(module)
    where = getattr(type(module).forward, "__globals__", {}).get("__name__", "")
    if where.split(".")[0] not in _KNOWN_CODE or any(attributes[name] for name in HOOKS):
        return False
    values = [value for name, value in attributes.items() if name not in TORCH_ATTRIBUTES and value is not None]
    if settings:  # somebody else looks at these
        values = [value for value in values if not isinstance(value, Tensor) and not is_settings(value)]
    return all(isinstance(value, _PLAIN) and not getattr(value, "__closure__", None) for value in values)


def _direct_call(
    compiled: _Compiled,
    flat: tuple[Any, ...],
    outputs: Any,
    state: Any,
    arguments: tuple[Any, ...],
    values: Sequence[Any],
    result: tuple[Any, ...],
) -> Callable[..., Any] | None:
    """A function of the state and the values that returns what the piece does, or None where something differs."""
    if not torch._inductor.config.size_asserts or len({id(value) for value in values}) < len(values):
        return None  # strides would not be checked, or two arguments that are one tensor now may be two later
    modules = [module for holder in arguments if isinstance(holder, nn.Module) for module in holder.modules()]
    if not all(map(is_plain, modules)):
        return None
    writer = _Writer(compiled, arguments, values)
    inputs = [writer.input(number, value) for number, value in enumerate(flat)]
    results = [writer.output(value, outputs) for value in result]
    if None in inputs or None in results:
        return None
    sizes = [text for text, value in zip(inputs, compiled.inputs, strict=True) if isinstance(value, torch.SymInt)]
    writer.check_sizes(sizes)
    return writer.function(state, [str(text) for text in inputs], [str(text) for text in results])


class _Writer:
    """Writes a direct call: its inputs in terms of its arguments, and its conditions."""

    def __init__(self, compiled: _Compiled, arguments: tuple[Any, ...], values: Sequence[Any]):
        self._compiled = compiled
        self._values = values
        self._places = {id(value): f"v{number}" for number, value in enumerate(values)}
        self._named = {f"x{number}": argument for number, argument in enumerate(arguments)}
        self._conditions: list[str] = []
        self._constants: dict[str, Any] = {}
        self._weights = self._all_weights(arguments)
        for number, value in enumerate(values):
            if not isinstance(value, Tensor):
                self._conditions.append(f"v{number} is {self._constant(value)}")
                continue
            self._conditions.append(f"type(v{number}) is {self._constant(type(value))}")
            self._conditions.append(f"v{number}.dtype is {self._constant(value.dtype)}")

    @staticmethod
    def _all_weights(arguments: tuple[Any, ...]) -> dict[int, list[tuple[dict[str, Any], str]]]:
        """Where each weight is: dictionaries of modules, and names in them."""
        found: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for argument in arguments:
            modules = argument.modules() if isinstance(argument, nn.Module) else ()
            owners = [owner for module in modules for owner in (module._parameters, module._buffers)]
            names = [(owner, name) for owner in owners for name in owner]
            if isinstance(argument, Weight):
                kinds = (argument.owner._parameters, argument.owner._buffers)
                names = [(owner, argument.name) for owner in kinds if argument.name in owner]
            for owner, name in names:
                places = found.setdefault(id(owner[name]), [])
                if all(known is not owner or other != name for known, other in places):
                    places.append((owner, name))
        return found

    def input(self, number: int, value: Any) -> str | None:
        """An input of the graph; None where it cannot be told from the arguments."""
        fake = self._compiled.inputs[number]
        if isinstance(fake, torch.SymInt):
            return self._size(fake)
        if type(value) not in (Tensor, nn.Parameter, nn.Buffer):
            return None
        if id(value) in self._places:
            place = self._places[id(value)]
            self._check_shape(place, fake)
            return place
        places = self._weights.get(id(value), [])
        if len(places) == 1:
            ((owner, name),) = places
            return f"{self._constant(owner)}[{name!r}]"
        if not places and value.dim() == 0 and value.device.type == "cpu":
            return self._number(self._compiled.sources[number], value)
        return None

    def _size(self, symbol: torch.SymInt) -> str | None:
        """A symbolic size as a size of one of the values."""
        wanted = symbol.node.expr
        for fake, value in zip(self._fakes(), self._values, strict=True):
            for dim, size in enumerate(() if fake is None else fake.shape):
                if isinstance(size, torch.SymInt) and size.node.expr == wanted:
                    return f"{self._places[id(value)]}.shape[{dim}]"
        return None

    def _fakes(self) -> list[Any]:
        """Per value the graph's input of it, if it is one."""
        by_name = dict(zip(self._compiled.sources, self._compiled.inputs, strict=True))
        names = [name for name, argument in self._named.items() if isinstance(argument, Value)]
        return [by_name.get(f"L['{name}']") for name in names]

    def _check_shape(self, place: str, fake: Tensor) -> None:
        for dim, size in enumerate(fake.shape):
            if isinstance(size, int):
                self._conditions.append(f"{place}.shape[{dim}] == {size}")

    def _number(self, source: str, value: Tensor) -> str | None:
        """A number that a module holds, which dynamo wraps."""
        root, _, path = source.removeprefix("L['").partition("'].")
        module = self._named.get(root)
        if not isinstance(module, nn.Module) or not path or not all(part.isidentifier() for part in path.split(".")):
            return None
        holder = self._constant(module)
        self._conditions.append(f"{holder}.{path} == {value.item()!r}")
        return self._constant(value)

    def check_sizes(self, sizes: Sequence[str | None]) -> None:
        """Add the guards on sizes: of the graph's symbolic inputs, in their order."""
        symbols = [value for value in self._compiled.inputs if isinstance(value, torch.SymInt)]
        environment = self._compiled.environment
        if not symbols or environment is None:
            return
        expression = environment.produce_guards_expression(placeholders=symbols)
        if expression:
            self._conditions.append(re.sub(r"L\['t(\d+)'\]", lambda found: f"({sizes[int(found[1])]})", expression))

    def output(self, value: Any, outputs: Sequence[Any]) -> str | None:
        """A result of the piece: one of the graph's, an argument, or None."""
        if value is None:
            return "None"
        for number, other in enumerate(outputs):
            if other is value:
                return f"found[{number}]"
        return self._places.get(id(value))

    def _constant(self, value: Any) -> str:
        name = f"c{len(self._constants)}"
        self._constants[name] = value
        return name

    def function(self, state: Any, inputs: list[str], results: list[str]) -> Callable[..., Any]:
        names = "".join(f"v{number}, " for number in range(len(self._values)))
        conditions = [f"state == {self._constant(state)}", *self._conditions]
        source = f"""def direct(state, values):
    {names}= values
    if not ({" and ".join(conditions)}):
        return None
    try:
        found = {self._constant(self._compiled.function)}({", ".join(inputs)})
    except AssertionError:  # of strides, before anything is computed
        return None
    return ({"".join(f"{result}, " for result in results)})
"""
        namespace = {**SYMPY_INTERP, **self._constants}
        exec(compile(source, "<direct call>", "exec"), namespace)
        function: Callable[..., Any] = namespace["direct"]
        return function
