"""An fx tracer that traces a *copy* of a module, so that nothing outside it is changed.

`torch.fx.Tracer.trace` patches `nn.Module` for the whole process while it runs: other threads' calls then end up in
its graph. Here the module tree is copied instead (parameters and buffers shared), every copy's `__call__` goes to the
tracer, and functions that use a replaced global run with a namespace of their own.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection
from typing import Any

from torch import fx, nn
from transformers import PreTrainedConfig

from dop_compile.hf.copies import BOUND_CALLS, rebind
from dop_compile.hf.rebuilt import names_in, with_globals
from dop_compile.hf.spellings import spelled
from dop_compile.identity import Same
from dop_compile.tracing.proxies import flatten

__all__ = ["ModuleTracer"]


class ModuleTracer(fx.Tracer):
    """Traces one module's forward; modules in `opened` (by id) are traced through, all others are nodes."""

    def __init__(self, root: nn.Module, opened: Collection[int]):
        super().__init__()
        self.root = root
        self.graph = fx.Graph()
        self.tensor_attrs = {}
        self._opened = frozenset(opened)
        self._paths: dict[Same, str] = {}
        self._classes: dict[type, type] = {}
        self._parameters: dict[Same, Any] = {}
        self._namespaces: dict[Same, tuple[dict[str, Any], set[str]]] = {}
        self._calls = 0
        self.failed_in: str | None = None
        self.copy = self._copy(root, "")

    # --- the copied module tree -----------------------------------------------------------------------------------

    def _copy(self, module: nn.Module, path: str) -> nn.Module:
        duplicate: nn.Module = object.__new__(type(module))
        vars(duplicate).update(vars(module))
        for name in BOUND_CALLS:
            vars(duplicate).pop(name, None)
        rebind(duplicate, {id(module): duplicate})
        vars(duplicate)["_modules"] = {
            name: None if child is None else self._copy(child, f"{path}.{name}" if path else name)
            for name, child in module._modules.items()
        }
        if not isinstance(module, nn.ModuleList | nn.ModuleDict):
            duplicate.__class__ = self._class(type(module))
        self._paths[Same(module)] = self._paths[Same(duplicate)] = path
        return duplicate

    def _class(self, kind: type) -> type:
        """A class like `kind` whose instances report to the tracer when they are called or read for a parameter."""
        if kind not in self._classes:
            tracer = self

            def __call__(module: Any, *args: Any, **kwargs: Any) -> Any:
                return tracer._call(module, args, kwargs)

            def __getattr__(module: Any, name: str) -> Any:
                return tracer._read(kind.__getattr__(module, name))  # type: ignore[attr-defined]

            members: dict[str, Any] = {"__call__": __call__, "__getattr__": __getattr__, "__module__": kind.__module__}
            methods = {name: value for base in reversed(kind.__mro__) for name, value in vars(base).items()}
            for name, method in methods.items():
                if method is vars(nn.Module).get(name) or not inspect.isfunction(method):
                    continue  # torch's own use nothing that is replaced, and are most of them
                if (rebuilt := self._rebuilt(method)) is not None:
                    members[name] = rebuilt
            self._classes[kind] = type(kind.__name__, (kind,), members)
        return self._classes[kind]

    def _call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not any(isinstance(a, fx.Proxy) for a in flatten((args, kwargs))):
            return type(module).__mro__[1].__call__(module, *args, **kwargs)
        path = self._paths[Same(module)]
        key = f"{path}@{self._calls}"
        self._calls += 1
        self.module_stack[key] = (path, type(module).__mro__[1])
        try:
            if self._is_opened(path):
                return module.forward(*args, **spelled(type(module).forward, kwargs))
            return self.create_proxy("call_module", path, args, kwargs)
        except Exception:
            self.failed_in = self.failed_in or path
            raise
        finally:
            del self.module_stack[key]

    def _is_opened(self, path: str) -> bool:
        return id(self.root.get_submodule(path)) in self._opened

    def _read(self, value: Any) -> Any:
        """A parameter that opened code reads becomes a node, so that the graph follows changes of it."""
        if not isinstance(value, nn.Parameter):
            return value
        if Same(value) not in self._parameters:
            name = next(name for name, parameter in self.root.named_parameters() if parameter is value)
            self._parameters[Same(value)] = self.create_proxy("get_attr", name, (), {})
        return self._parameters[Same(value)]

    # --- functions that call what has to become a node ------------------------------------------------------------

    def replacement(self, name: str, value: Any) -> Any:
        """What traced code sees under a global name in place of `value`; None to leave it."""
        return None

    def _namespace(self, namespace: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
        """A module's globals with replacements and with copies of the functions that use them, and their names."""
        if Same(namespace) not in self._namespaces:
            own = {name: new for name, v in list(namespace.items()) if (new := self.replacement(name, v)) is not None}
            shared, names = {**namespace, **own}, set(own)
            plain = {n: v for n, v in shared.items() if inspect.isfunction(v) and v.__globals__ is namespace}
            while users := {n for n, v in plain.items() if n not in names and names & names_in(v)}:
                names |= users
            for name in names - set(own):
                shared[name] = with_globals(plain[name], shared)
            self._namespaces[Same(namespace)] = shared, names
        return self._namespaces[Same(namespace)]

    def _rebuilt(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """The function in its own namespace; None if it uses nothing that is replaced."""
        inner = inspect.unwrap(function)
        if not isinstance(inner, types.FunctionType):
            return None
        namespace, names = self._namespace(inner.__globals__)
        return with_globals(inner, namespace) if names & names_in(inner) else None

    # --- arguments and tracing ------------------------------------------------------------------------------------

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, nn.Module):
            return self.create_node("get_attr", self._paths[Same(a)], (), {})
        if isinstance(a, PreTrainedConfig):
            return a
        try:
            return super().create_arg(a)
        except NotImplementedError:
            return a  # a configuration or a mask function: carried as it is by the nodes that the runtime interprets

    def record(self, function: Callable[[nn.Module], Any]) -> fx.Graph:
        """The graph of `function` of the copied module, whose result is the graph's output."""
        self.create_node("output", "output", (self.create_arg(function(self.copy)),), {})
        return self.graph
