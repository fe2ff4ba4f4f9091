"""Trace a Hugging Face text decoder into an fx graph at module granularity.

The decoder's own forward is traced - masks, rotary tables, anything between layers - not a copy of it. Modules that
contain attention are opened down to their projections; every other module (norm, projection, MLP) stays one node and
so keeps its hooks, adapters and quantisation. Hugging Face's mask builders and attention kernels are single nodes.

Each node carries an example value (``meta["val"]``, a fake tensor) so that Python control flow over ranks and dtypes
resolves while tracing. The batch and token sizes of the examples are large primes: any size that they divide is known
to be dynamic, and control flow over such a size is refused instead of being frozen.

Refused, as `UnsupportedModelError`: decoders without a layer list, hooks on a module that has to be opened, control
flow on token counts or tensor contents, attention that does not go through the attention interface.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, masking_utils

from dop_compile import ops
from dop_compile.errors import UnsupportedModelError

__all__ = [
    "BATCH",
    "CACHE_INPUT",
    "TOKENS",
    "DecoderInputs",
    "TracedDecoder",
    "find_layers",
    "is_packed",
    "trace_decoder",
]

BATCH = 100_003
TOKENS = 1_000_003
PACKED = 10_000_019
"""Example sizes of the batch, token and packed-visual-token dimensions: primes that no model dimension contains."""

CACHE_INPUT = "past_key_values"
MASK_BUILDERS = frozenset(
    function
    for name, function in vars(masking_utils).items()
    if name.startswith("create_") and inspect.isfunction(function)
)
_TRACE_LOCK = threading.RLock()


class _Opaque:
    """Example value of something that is not a tensor (a cache, a mask that may be None)."""

    def __repr__(self) -> str:
        return "opaque"


OPAQUE = _Opaque()


@dataclass(frozen=True)
class DecoderInputs:
    """Which optional inputs the outer model hands to its decoder; one graph is traced per combination.

    Args:
        position_rows: leading size of `position_ids` (rows, batch, tokens); None for (batch, tokens).
        masks: keys of the mask dictionary that the outer model builds itself; None if the decoder builds the mask.
        cached: whether keys and values are stored.
        packed: how many tensors of packed per-visual-token features (DeepStack) are handed over.
        constants: other keyword arguments, all of them plain Python values.
    """

    position_rows: int | None = None
    masks: tuple[str, ...] | None = None
    cached: bool = True
    packed: int = 0
    constants: tuple[tuple[str, Any], ...] = ()


@dataclass
class TracedDecoder:
    """A decoder graph and the modules that its nodes name.

    The graph's placeholders are `inputs_embeds` (batch, tokens, hidden), `position_ids`, `attention_mask` or one
    placeholder per mask, `past_key_values`, and packed visual features; its output is the last hidden state.
    """

    graph: fx.Graph
    root: nn.Module
    inputs: DecoderInputs
    layer_prefix: str
    num_layers: int
    output_class: type | None = None
    report: list[str] = field(default_factory=list)

    def layer_of(self, node: fx.Node) -> int | None:
        """The layer whose forward created the node."""
        for path, _ in reversed((node.meta.get("nn_module_stack") or {}).values()):
            if path.startswith(self.layer_prefix + "."):
                return int(path[len(self.layer_prefix) + 1 :].split(".")[0])
        return None


def find_layers(decoder: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's list of layers and its path, by structure: the first list as long as the configuration says."""
    count = getattr(decoder.config, "num_hidden_layers", None)
    for path, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return path, module
    raise UnsupportedModelError(
        f"{type(decoder).__name__} has no list of {count} layers; dop_compile needs a decoder whose layers stand in "
        "one nn.ModuleList"
    )


def _names_of(function: Any) -> set[str]:
    code = inspect.unwrap(function).__code__
    return set(code.co_names)


def _is_attention(module: nn.Module) -> bool:
    return "ALL_ATTENTION_FUNCTIONS" in _names_of(type(module).forward)


def _check_openable(path: str, module: nn.Module) -> None:
    """A module that is opened no longer runs its `__call__`: whatever was attached to that must be refused."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    # Hugging Face leaves recording hooks behind after output_hidden_states; they do nothing unless a record is active
    foreign = [hook for hook in hooks if not getattr(hook, "__module__", "").endswith("output_capturing")]
    if foreign or "forward" in vars(module):
        raise UnsupportedModelError(
            f"{path or 'the decoder'} ({type(module).__name__}) has a forward hook or a replaced forward; "
            "dop_compile opens this module and would bypass it. Remove the hook, or put it on the norm, projection "
            "or MLP inside, where hooks are honoured"
        )


class _Refused(UnsupportedModelError):
    pass


class ValueProxy(fx.Proxy):
    """An fx proxy that knows the rank, dtype and static sizes of what it stands for."""

    @property
    def value(self) -> Any:
        return self.node.meta.get("val", OPAQUE)

    def size(self, dim: int | None = None) -> Any:
        shape = self.shape
        return shape if dim is None else shape[dim]

    @property
    def shape(self) -> Any:
        value = self.value
        if not isinstance(value, Tensor):
            return super().__getattr__("shape")
        return tuple(
            self.tracer.create_proxy("call_method", "size", (self, dim), {}) if _is_dynamic(size) else int(size)
            for dim, size in enumerate(value.shape)
        )

    @property
    def ndim(self) -> int:
        return int(self.value.dim())

    def dim(self) -> int:
        return self.ndim

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    @property
    def device(self) -> Any:
        return self.value.device

    def __len__(self) -> int:
        value = self.value
        if isinstance(value, tuple | list):
            return len(value)
        raise _Refused(f"the length of {self.node} is needed while tracing and is not known")

    def __iter__(self) -> Iterator[Any]:
        value = self.value
        if isinstance(value, tuple | list):
            return iter([self[index] for index in range(len(value))])
        if isinstance(value, Tensor) and not _is_dynamic(value.shape[0]):
            return iter([self[index] for index in range(value.shape[0])])
        raise _Refused(f"iterates over {self.node}, whose length is only known at run time")

    def __bool__(self) -> bool:
        value = self.value
        if isinstance(value, bool) and not self.node.meta.get("dynamic"):
            return value
        raise _Refused(f"control flow depends on {self.node}, which is only known at run time")

    def __setitem__(self, index: Any, new: Any) -> None:
        # The Python variable goes on to mean the changed tensor, as it does for the caller
        self.node = self.tracer.create_proxy("call_function", ops.masked_assign, (self, index, new), {}).node

    def __hash__(self) -> int:
        return id(self)


def _is_dynamic(size: Any) -> bool:
    return isinstance(size, int) and size > 1 and any(size % prime == 0 for prime in (BATCH, TOKENS, PACKED))


class DecoderTracer(fx.Tracer):
    """Traces `root.decoder` with example values; see the module docstring."""

    def __init__(self, opened: set[int], inputs: DecoderInputs, hidden_size: int, dtype: torch.dtype, device: Any):
        super().__init__()
        self._opened = opened
        self._inputs = inputs
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._example = (hidden_size, dtype, device)
        self._evaluating = False
        self._memo: dict[Any, Any] = {}

    # --- what is a node -------------------------------------------------------------------------------------------

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) not in self._opened

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._evaluating:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self._evaluating:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, nn.Module):
            return self.create_node("get_attr", self.path_of_module(a), (), {})
        if isinstance(a, PreTrainedConfig):
            return a
        try:
            return super().create_arg(a)
        except NotImplementedError:
            return a  # a configuration or a mask function: carried as it is by the nodes that the runtime interprets

    def proxy(self, node: fx.Node) -> ValueProxy:
        return ValueProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        if kind not in ("placeholder", "output"):
            self._note_value(proxy.node, kind, target, args, kwargs)
        return proxy

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        hidden, dtype, device = self._example
        inputs: dict[str, Any] = dict(self._inputs.constants)
        with self._fake:
            embeds = torch.empty(BATCH, TOKENS, hidden, dtype=dtype, device=device)
            rows = self._inputs.position_rows
            shape = (BATCH, TOKENS) if rows is None else (rows, BATCH, TOKENS)
            positions = torch.empty(shape, dtype=torch.long, device=device)
            visual = torch.empty(BATCH, TOKENS, dtype=torch.bool, device=device)
            packed = torch.empty(PACKED, hidden, dtype=dtype, device=device)
        inputs["inputs_embeds"] = self._placeholder("inputs_embeds", embeds)
        inputs["position_ids"] = self._placeholder("position_ids", positions)
        if self._inputs.masks is None:
            inputs["attention_mask"] = self._placeholder("attention_mask", OPAQUE)
        else:
            inputs["attention_mask"] = {
                key: self._placeholder(f"attention_mask_{key}", OPAQUE) for key in self._inputs.masks
            }
        inputs[CACHE_INPUT] = self._placeholder(CACHE_INPUT, OPAQUE) if self._inputs.cached else None
        if self._inputs.packed:
            inputs["visual_pos_masks"] = self._placeholder("visual_pos_masks", visual)
            inputs["deepstack_visual_embeds"] = [
                self._placeholder(f"packed_{index}", packed) for index in range(self._inputs.packed)
            ]
        return root_fn, [self.root, inputs]

    def _placeholder(self, name: str, value: Any) -> Any:
        proxy = self.create_proxy("placeholder", name, (), {})
        proxy.node.meta["val"] = value
        return proxy

    # --- example values -------------------------------------------------------------------------------------------

    def _note_value(self, node: fx.Node, kind: str, target: Any, args: Any, kwargs: Any) -> None:
        def value_of(a: Any) -> Any:
            return a.value if isinstance(a, ValueProxy) else a

        nodes = [a for a in _flatten((args, kwargs)) if isinstance(a, ValueProxy)]
        plain_args, plain_kwargs = _map((args, kwargs), value_of)
        value = self._value(kind, target, plain_args, plain_kwargs)
        node.meta["val"] = value
        if isinstance(value, bool | int | float):
            node.meta["dynamic"] = _is_dynamic(value) or any(proxy.node.meta.get("dynamic") for proxy in nodes)

    def _value(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "call_method" and target == "update":
            return (args[1], args[2])
        if target is ops.masked_assign:
            return args[0]
        if target is operator.getitem and isinstance(args[0], Tensor) and _is_mask(args[1]):
            with self._fake:
                return args[0].new_empty(PACKED, *args[0].shape[2:])
        if kind == "get_attr" or target in MASK_BUILDERS or any(a is OPAQUE for a in _flatten((args, kwargs))):
            return OPAQUE
        key = self._key(kind, target, args, kwargs)
        if key is not None and key in self._memo:
            return self._memo[key]
        value = self._evaluate(kind, target, args, kwargs)
        if key is not None:
            self._memo[key] = value
        return value

    def _evaluate(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        self._evaluating = True
        try:
            with self._fake, torch.no_grad():
                if kind == "call_module":
                    return self.root.get_submodule(target)(*args, **kwargs)
                if kind == "call_method":
                    return getattr(args[0], target)(*args[1:], **kwargs)
                return target(*args, **kwargs)
        except Exception as error:
            if kind == "call_module":  # mixtures route by content: their output still has their input's shape
                return next((a for a in _flatten((args, kwargs)) if isinstance(a, Tensor)), OPAQUE)
            raise _Refused(f"{target} cannot be evaluated on example values: {error}") from error
        finally:
            self._evaluating = False

    def _key(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        def describe(a: Any) -> Any:
            return (tuple(a.shape), a.dtype, str(a.device)) if isinstance(a, Tensor) else a

        if kind == "call_module":
            module = self.root.get_submodule(target)
            weights = tuple((name, tuple(p.shape), p.dtype) for name, p in module.named_parameters())
            target = (type(module), weights, module.training)
        key = (kind, target, repr(_map((args, kwargs), describe)))
        try:
            hash(key)
        except TypeError:
            return None
        return key


def _is_mask(index: Any) -> bool:
    """Whether an index selects (batch, tokens) positions by a boolean mask, which packs them."""
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in _flatten(index))


def is_packed(value: Any) -> bool:
    """Whether a value holds packed tokens, whose number depends on data."""
    return isinstance(value, Tensor) and PACKED in value.shape


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_map(item, function) for item in value)
    if isinstance(value, dict):
        return {key: _map(item, function) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(_map(value.start, function), _map(value.stop, function), _map(value.step, function))
    return function(value)


def _flatten(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _flatten(item)
    elif isinstance(value, dict):
        yield from _flatten(list(value.values()))
    elif isinstance(value, slice):
        yield from _flatten([value.start, value.stop, value.step])
    else:
        yield value


class _AttentionLeaf:
    """Stands in for Hugging Face's attention registry while tracing: every kernel becomes one node."""

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
        def attention(module: nn.Module, query: Any, key: Any, value: Any, mask: Any = None, **kwargs: Any) -> Any:
            if not isinstance(query, ValueProxy):
                return kernel(module, query, key, value, mask, **kwargs)
            proxy = fx.Tracer.create_proxy(
                self._tracer, "call_function", kernel, (module, query, key, value, mask), kwargs
            )
            q, v = query.value, value.value
            with self._tracer._fake:
                out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
            proxy.node.meta["val"] = (out, None)
            proxy.node.meta["attention"] = True
            return proxy

        return attention


@contextlib.contextmanager
def _leaf_functions(decoder: nn.Module, tracer: DecoderTracer) -> Iterator[None]:
    """While tracing, mask builders and attention kernels become nodes; other threads' calls pass through."""

    def leaf(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(a, ValueProxy) for a in _flatten((args, kwargs))):
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return call

    modules = {sys.modules[type(m).__module__] for m in decoder.modules() if type(m).__module__ in sys.modules}
    patched: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in modules:
            namespace = vars(module)
            for name, value in list(namespace.items()):
                if inspect.isfunction(value) and value in MASK_BUILDERS:
                    patched.append((namespace, name, value))
                    namespace[name] = leaf(value)
                elif name == "ALL_ATTENTION_FUNCTIONS":
                    patched.append((namespace, name, value))
                    namespace[name] = _AttentionLeaf(value, tracer)
        yield
    finally:
        for namespace, name, value in patched:
            namespace[name] = value


class _Root(nn.Module):
    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder = decoder
        self.output_class: type | None = None

    def forward(self, inputs: dict[str, Any]) -> Any:
        # The decorators around a text model's forward fill in defaults and collect outputs: done once by the runtime
        output = inspect.unwrap(type(self.decoder).forward)(self.decoder, **inputs)
        if isinstance(output, tuple):
            return output[0]
        self.output_class = type(output)
        return output.last_hidden_state


def trace_decoder(decoder: nn.Module, inputs: DecoderInputs | None = None) -> TracedDecoder:
    """Trace a text decoder (for example a `LlamaModel`).

    Args:
        decoder: a Hugging Face text decoder, on any device including meta; it is not changed.
        inputs: which optional inputs the graph takes; by default those of a plain cached call.

    Raises:
        UnsupportedModelError: the decoder cannot be traced; the message names the module and the reason.
    """
    inputs = inputs or DecoderInputs()
    layers_path, layers = find_layers(decoder)
    opened: set[int] = set()
    for path, module in decoder.named_modules():
        if any(_is_attention(child) for child in module.modules()):
            _check_openable(path, module)
            opened.add(id(module))
    if not opened:
        raise UnsupportedModelError(
            f"no module of {type(decoder).__name__} calls the attention interface; only Hugging Face decoders whose "
            "attention goes through ALL_ATTENTION_FUNCTIONS are supported"
        )
    root = _Root(decoder).eval() if not decoder.training else _Root(decoder)
    weight = next(p for p in layers.parameters())
    floating = weight.dtype if weight.dtype.is_floating_point else torch.get_default_dtype()
    tracer = DecoderTracer(opened, inputs, decoder.config.hidden_size, floating, weight.device)
    with _TRACE_LOCK, _leaf_functions(decoder, tracer):
        try:
            graph = tracer.trace(root)
        except (_Refused, fx.proxy.TraceError) as error:
            raise UnsupportedModelError(f"{type(decoder).__name__} cannot be traced: {error}") from error
    for node in graph.nodes:
        if node.op == "call_method" and node.target == "update":
            node.op, node.target = "call_function", ops.update_cache
            node.meta["effect"] = True
        elif node.target is operator.iadd:
            node.target = operator.add
    return TracedDecoder(
        graph,
        root,
        inputs,
        layer_prefix=f"decoder.{layers_path}",
        num_layers=len(layers),
        output_class=root.output_class,
    )
