"""Trace a decoder with example values; mask builders and attention kernels become single nodes.

Every node's value is computed once on fake tensors (layers repeat, so most values are found again). A module whose
value cannot be computed that way, because it routes by content, is looked at part by part.
"""

from __future__ import annotations

import inspect
import logging
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dop_compile import ops
from dop_compile.hf.copies import BOUND_CALLS, rebind
from dop_compile.hf.kernels import ATTENTION_REGISTRY, MASK_BUILDERS, following_runs
from dop_compile.hf.mixers import is_mixer
from dop_compile.hf.names import LEAVES_ROWS_OUT
from dop_compile.hf.spellings import CACHE, EMBEDS, MASK, POSITIONS, require, spelled
from dop_compile.tracing.decoder_inputs import DecoderInputs
from dop_compile.tracing.module_tracer import ModuleTracer
from dop_compile.tracing.proxies import (
    BATCH,
    OPAQUE,
    PACKED,
    TOKENS,
    Refused,
    ValueProxy,
    flatten,
    is_dynamic,
    map_nested,
)

__all__ = ["CACHE_INPUT", "DecoderTracer"]

CACHE_INPUT = CACHE

# What a module cannot do with example values is no news to the user: PyTorch's log of it is dropped, in this thread
_EVALUATING = threading.local()
logging.getLogger("torch._subclasses.fake_tensor").addFilter(lambda record: not getattr(_EVALUATING, "active", False))


class DecoderTracer(ModuleTracer):
    """Traces a decoder with example values; mask builders and attention kernels become single nodes.

    Args:
        decoder: the text decoder; it is not changed.
        opened: ids of the modules to trace through.
        inputs: the optional inputs of the graph.
        dtype, device: of the embeddings.
    """

    def __init__(self, decoder: nn.Module, opened: Collection[int], inputs: DecoderInputs, dtype: Any, device: Any):
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._memo: dict[Any, Any] = {}
        self._without_hooks: dict[str, nn.Module] = {}
        self._inputs = inputs
        config: Any = decoder.config
        self._example = (int(config.hidden_size), dtype, device)
        root = nn.Module()
        root.decoder = decoder
        root.training = decoder.training
        super().__init__(root, opened)
        # Which rows are asked for is known when a graph is pruned, and `remove_dead` leaves out more than these do
        own: Any = self.copy.get_submodule("decoder")
        vars(own).update({name: None for name in LEAVES_ROWS_OUT if name in vars(own)})

    def trace_decoder(self) -> tuple[fx.Graph, type | None]:
        """The graph, and the class of the decoder's output; None for a tuple."""
        output_class: list[type] = []

        def forward(root: Any) -> Any:
            # The decorators around a text model's forward fill in defaults and collect outputs: done by the runtime
            decoder = root.decoder
            function = inspect.unwrap(type(decoder).forward)
            arguments = self._arguments()
            require(function, *(name for name in (EMBEDS, MASK, POSITIONS, CACHE) if arguments[name] is not None))
            output = function(decoder, **spelled(function, arguments))
            if isinstance(output, tuple):
                return output[0]
            output_class.append(type(output))
            return output.last_hidden_state

        graph = self.record(forward)
        return graph, output_class[0] if output_class else None

    def _arguments(self) -> dict[str, Any]:
        hidden, dtype, device = self._example
        arguments: dict[str, Any] = dict(self._inputs.constants)
        with self._fake:
            embeds = torch.empty(BATCH, TOKENS, hidden, dtype=dtype, device=device)
            rows = self._inputs.position_rows
            shape = (BATCH, TOKENS) if rows is None else (rows, BATCH, TOKENS)
            positions = torch.empty(shape, dtype=torch.long, device=device)
            packed = torch.empty(PACKED, hidden, dtype=dtype, device=device)
        arguments[EMBEDS] = self._placeholder(EMBEDS, embeds)
        arguments[POSITIONS] = self._placeholder(POSITIONS, positions)
        if self._inputs.masks is None:
            arguments[MASK] = mask = self._placeholder(MASK, OPAQUE)
            mask.node.meta["dims"] = 2
        else:
            arguments[MASK] = {key: self._placeholder(f"{MASK}_{key}", OPAQUE) for key in self._inputs.masks}
        arguments[CACHE_INPUT] = self._placeholder(CACHE_INPUT, OPAQUE) if self._inputs.cached else None
        for name, sizes, kind in self._inputs.token_values:
            with self._fake:
                value = torch.empty(BATCH, TOKENS, *sizes, dtype=kind, device=device)
            arguments[name] = self._placeholder(name, value)
        if self._inputs.packed:
            features = [self._placeholder(f"packed_{index}", packed) for index in range(self._inputs.packed)]
            keys = self._inputs.packed_keys
            arguments[self._inputs.packed_name] = features if keys is None else dict(zip(keys, features, strict=True))
        return arguments

    def _placeholder(self, name: str, value: Any) -> Any:
        proxy = self.create_proxy("placeholder", name, (), {})
        proxy.node.meta["val"] = value
        return proxy

    # --- what becomes a single node -------------------------------------------------------------------------------

    def replacement(self, name: str, value: Any) -> Any:
        if name == ATTENTION_REGISTRY:
            return _KernelRegistry(value, self)
        if inspect.isfunction(value) and value in MASK_BUILDERS:

            def build(*args: Any, **kwargs: Any) -> Any:
                if any(isinstance(a, ValueProxy) for a in flatten((args, kwargs))):
                    return self.create_proxy("call_function", value, args, kwargs)
                return value(*args, **kwargs)

            return build
        return None

    def attention(self, kernel: Callable[..., Any], module: nn.Module, *tensors: Any, **kwargs: Any) -> Any:
        """The node of an attention kernel; its output is (batch, queries, heads, head dimension) and weights."""
        query, key, value, *rest = tensors
        mask = rest[0] if rest else kwargs.pop("attention_mask", None)
        proxy = super().create_proxy("call_function", kernel, (module, query, key, value, mask), kwargs)
        q, v = query.value, value.value
        if not (isinstance(q, Tensor) and isinstance(v, Tensor)):
            raise Refused(f"the shapes of the queries {query.node} and values {value.node} are not known")
        with self._fake:
            out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
        proxy.node.meta["val"] = (out, None)
        proxy.node.meta["attention"] = True
        return proxy

    # --- example values -------------------------------------------------------------------------------------------

    def proxy(self, node: fx.Node) -> ValueProxy:
        return ValueProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        if kind not in ("placeholder", "output"):
            self._note_value(proxy.node, kind, target, args, kwargs)
        return proxy

    def _note_value(self, node: fx.Node, kind: str, target: Any, args: Any, kwargs: Any) -> None:
        proxies = [a for a in flatten((args, kwargs)) if isinstance(a, ValueProxy)]
        plain = map_nested((args, kwargs), lambda a: a.value if isinstance(a, ValueProxy) else a)
        value = self._value(kind, target, *plain)
        node.meta["val"] = value
        if isinstance(value, bool | int | float):
            node.meta["dynamic"] = is_dynamic(value) or any(proxy.node.meta.get("dynamic") for proxy in proxies)

    def _value(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "get_attr":
            return self._fake.from_tensor(self.root.get_parameter(target))
        if kind == "call_method" and target == "update":
            return (args[1], args[2])
        if kind == "call_method" and target == "get_seq_length":
            return TOKENS
        if target is ops.masked_assign:
            return args[0]
        if target is operator.getitem and isinstance(args[0], Tensor) and _is_mask(args[1]):
            with self._fake:
                return args[0].new_empty(PACKED, *args[0].shape[2:])
        if target in MASK_BUILDERS:
            return OPAQUE
        if kind == "call_module" and is_mixer(self.root.get_submodule(target)):
            return next(a for a in flatten((args, kwargs)) if isinstance(a, Tensor))  # its scan is not for examples
        if any(a is OPAQUE for a in flatten((args, kwargs))):
            return self._value_without_opaque(target, args, kwargs) if kind == "call_module" else OPAQUE
        key = self._key(kind, target, args, kwargs)
        if key is not None and key in self._memo:
            return self._memo[key]
        value = self._evaluate(kind, target, args, kwargs)
        if key is not None:
            self._memo[key] = value
        return value

    def _value_without_opaque(self, path: str, args: Any, kwargs: Any) -> Any:
        """A module's value may not depend on a mask or cache that it is handed besides: try with None for those."""
        plain = map_nested((args, kwargs), lambda a: None if a is OPAQUE else a)
        _EVALUATING.active = True
        try:
            with self._fake, torch.no_grad():
                return self._bare(path)(*plain[0], **plain[1])
        except Exception:
            return OPAQUE
        finally:
            _EVALUATING.active = False

    def _evaluate(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        _EVALUATING.active = True
        try:
            with self._fake, torch.no_grad():
                if kind == "call_module":
                    return self._bare(target)(*args, **kwargs)
                if kind == "call_method":
                    return getattr(args[0], target)(*args[1:], **kwargs)
                return target(*args, **kwargs)
        except Exception as error:
            if kind == "call_module":
                return self._value_by_parts(target, args, kwargs)
            name = target if isinstance(target, str) else getattr(target, "__name__", target)
            raise Refused(f"{name} cannot be evaluated on example values: {error}") from error
        finally:
            _EVALUATING.active = False

    def _value_by_parts(self, path: str, args: Any, kwargs: Any) -> Any:
        """Mixtures route by content: what their parts return tells what they return, else it is like their input."""
        module = self._bare(path)
        fallback = next((a for a in flatten((args, kwargs)) if isinstance(a, Tensor)), OPAQUE)
        if not list(module.children()):
            return fallback
        parts = _PartsTracer(module, self._fake)
        try:
            proxies = map_nested((args, kwargs), lambda a: parts._placeholder("x", a) if isinstance(a, Tensor) else a)
            result = parts._call(parts.copy.get_submodule("part"), *proxies)
        except Exception:
            return self._value_of_text(path, args, kwargs, fallback)
        return map_nested(result, lambda a: a.value if isinstance(a, ValueProxy) else a)

    def _value_of_text(self, path: str, args: Any, kwargs: Any, fallback: Any) -> Any:
        """What a mixture returns does not depend on the kinds of its tokens: try without them."""

        def without_kinds(a: Any) -> Any:
            return None if isinstance(a, Tensor) and not a.dtype.is_floating_point else a

        plain = map_nested((args, kwargs), without_kinds)
        if repr(plain) == repr((args, kwargs)):
            return fallback
        return self._value("call_module", path, *plain)

    def _bare(self, path: str) -> nn.Module:
        """A module without the user's hooks, which are not for example values."""
        if path not in self._without_hooks:
            self._without_hooks[path] = _copy_without_hooks(self.root.get_submodule(path))
        return self._without_hooks[path]

    def _key(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        """What decides an example value: layers repeat, so most are found again; None if it cannot be told."""

        def describe(a: Any) -> Any:
            return (tuple(a.shape), a.dtype, str(a.device)) if isinstance(a, Tensor) else a

        if kind == "call_module":
            module = self.root.get_submodule(target)
            weights = tuple((name, tuple(p.shape), p.dtype) for name, p in module.named_parameters())
            target = (type(module), weights, module.training)
        key = (kind, target, repr(map_nested((args, kwargs), describe)))
        try:
            hash(key)
        except TypeError:
            return None
        return key


class _PartsTracer(DecoderTracer):
    """Traces one module for its example value alone."""

    def __init__(self, module: nn.Module, fake: FakeTensorMode):
        self._fake = fake
        self._memo, self._without_hooks = {}, {}
        root = nn.Module()
        root.part = module
        ModuleTracer.__init__(self, root, {id(module)})


def _copy_without_hooks(module: nn.Module) -> nn.Module:
    copy: nn.Module = object.__new__(type(module))
    vars(copy).update(vars(module))
    for name in ("forward", *BOUND_CALLS):
        vars(copy).pop(name, None)
    rebind(copy, {id(module): copy})
    for name in vars(module):
        if name.startswith("_") and name.endswith("_hooks"):
            vars(copy)[name] = OrderedDict()
    children = module._modules.items()
    vars(copy)["_modules"] = {name: child and _copy_without_hooks(child) for name, child in children}
    return copy


def _is_mask(index: Any) -> bool:
    """Whether an index selects (batch, tokens) positions by a boolean mask, which packs them."""
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in flatten(index))


class _KernelRegistry:
    """Stands in for Hugging Face's attention registry in traced code: every kernel becomes one node."""

    def __init__(self, registry: Any, tracer: DecoderTracer):
        self._registry = registry
        self._tracer = tracer

    def get_interface(self, implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return self._leaf(self._registry.get_interface(implementation, default))

    def __getitem__(self, implementation: str) -> Callable[..., Any]:
        return self._leaf(self._registry[implementation])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._registry, name)

    def _leaf(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self._tracer.attention(following_runs(kernel), module, *args, **kwargs)

        return attention
